// Package data holds real data for the tour.
package data

import _ "embed"

// SeattleWeather is a CSV file; README.md says where it comes from.
//
//go:embed seattle-weather.csv
var SeattleWeather []byte

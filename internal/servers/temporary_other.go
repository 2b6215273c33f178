//go:build !linux

package servers

// temporaryRoot is where temporary servers live. Empty is the system's own folder for such things.
func temporaryRoot() string { return "" }

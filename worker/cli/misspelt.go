package cli

import (
	"fmt"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

// settingsOfAll returns the variables that any of the program's commands reads, sorted.
func (in *invocation) settingsOfAll(grammar *kong.Application) []string {
	var names []string
	_ = kong.Visit(grammar, func(node kong.Visitable, next kong.Next) error {
		if flag, ok := node.(*kong.Flag); ok {
			names = append(names, flag.Envs...)
		}
		return next(nil)
	})
	for _, of := range in.settings.groups {
		for _, set := range of.settings { // secrets have no flag that reads them
			names = append(names, set.variable)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// misspelt returns a line for each variable of the environment that looks like a misspelt
// setting. None has a value in it.
func (in *invocation) misspelt() []string {
	if in.Environ == nil {
		return nil
	}
	var given []string
	for _, entry := range in.Environ() {
		name, value, _ := strings.Cut(entry, "=")
		if name != "" && value != "" {
			given = append(given, name)
		}
	}
	slices.Sort(given)
	var lines []string
	for _, name := range slices.Compact(given) {
		if setting := meant(name, in.variables, given); setting != "" {
			lines = append(lines, fmt.Sprintf("%s is no setting; did you mean %s?", name, setting))
		}
	}
	return lines
}

// printMisspelt prints the lines of misspelt.
func (in *invocation) printMisspelt() {
	for _, line := range in.misspelt() {
		fmt.Fprintf(in.stderr, "%s: %s\n", in.Name, line)
	}
}

// meant returns the setting that a variable is misspelt of, or "". One letter in six may be
// wrong, two at most, and not the first; capitals don't count. A setting that is given itself isn't meant, because
// a variable beside it, such as DATABASE_URL_2 or REDIS_URI, is then another program's.
func meant(name string, settings, given []string) string {
	if slices.Contains(settings, name) {
		return ""
	}
	best, least := "", 3
	for _, setting := range settings {
		a, b := strings.ToUpper(name), strings.ToUpper(setting)
		if len(b) < 6 || a[0] != b[0] || slices.Contains(given, setting) {
			continue
		}
		if d := distance(a, b); d < least && d <= min(2, len(b)/6) {
			best, least = setting, d
		}
	}
	return best
}

// distance is how many letters must be inserted, deleted or replaced, or swapped with their
// neighbours, to make one of the words of the other: the Damerau–Levenshtein distance, in
// the form in which nothing is changed twice.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		rows[i][0] = i
	}
	for j := range rows[0] {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		for j := 1; j <= len(b); j++ {
			replaced := rows[i-1][j-1]
			if a[i-1] != b[j-1] {
				replaced++
			}
			rows[i][j] = min(replaced, rows[i-1][j]+1, rows[i][j-1]+1)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				rows[i][j] = min(rows[i][j], rows[i-2][j-2]+1)
			}
		}
	}
	return rows[len(a)][len(b)]
}

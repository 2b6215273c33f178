package cli

// colour is an ANSI escape sequence that sets the colour of what follows it. All are of one
// length, so that a column whose cells are all painted stays straight.
type colour string

const (
	normal colour = "\x1b[39m"
	red    colour = "\x1b[31m"
	yellow colour = "\x1b[33m"
)

// painter returns a text in a colour, or as it is where there are no colours.
type painter func(c colour, text string) string

// painter returns the one for the standard output: with colours on a terminal, unless
// NO_COLOR is set or the terminal is a dumb one.
func (in *invocation) painter() painter {
	if !isTerminal(in.stdout) || in.Env("NO_COLOR") != "" || in.Env("TERM") == "dumb" {
		return unpainted
	}
	return painted
}

func painted(c colour, text string) string { return string(c) + text + string(normal) }

func unpainted(_ colour, text string) string { return text }

package cli

import (
	"fmt"
	"regexp"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

// completionCmd prints scripts that let a shell complete the program's command lines. What
// there is to choose from is known by the program alone: a script hands the line to the
// hidden command words, which answers in a few milliseconds.
type completionCmd struct {
	Bash  completionBashCmd  `cmd:"" help:"For bash: eval \"$$(${name} completion bash)\", in ~/.bashrc."`
	Zsh   completionZshCmd   `cmd:"" help:"For zsh: source <(${name} completion zsh), in ~/.zshrc behind compinit."`
	Fish  completionFishCmd  `cmd:"" help:"For fish: ${name} completion fish > ~/.config/fish/completions/${name}.fish."`
	Words completionWordsCmd `cmd:"" hidden:"" help:"The words that a line may go on with."`
}

type completionBashCmd struct{}

// Run prints the script. bash takes : and = for the end of a word and replaces only what
// follows; the program sees the whole word.
func (completionBashCmd) Run(in *invocation) error {
	return in.printScript(`FUNCTION() {
  local line="${COMP_LINE:0:COMP_POINT}" breaks="${COMP_WORDBREAKS//[^:=]/}" IFS=$'\n'
  local word="${line##* }"
  COMPREPLY=($("$1" completion words -- "$line" 2>/dev/null))
  if [[ -n $breaks && $word == *[$breaks]* ]]; then
    COMPREPLY=("${COMPREPLY[@]#"${word%"${word##*[$breaks]}"}"}")
  fi
}
complete -o default -F FUNCTION PROGRAM
`)
}

type completionZshCmd struct{}

// Run prints the script.
func (completionZshCmd) Run(in *invocation) error {
	return in.printScript(`#compdef PROGRAM
FUNCTION() {
  local line
  local -a choices
  for line in "${(@f)$("${words[1]}" completion words --describe -- "${(j: :)words[1,CURRENT]}" 2>/dev/null)}"; do
    [[ -n $line ]] && choices+=("${${line%%$'\t'*}//:/\\:}:${line#*$'\t'}")
  done
  if (( $#choices )); then _describe 'PROGRAM' choices; else _files; fi
}
compdef FUNCTION PROGRAM
`)
}

type completionFishCmd struct{}

// Run prints the script.
func (completionFishCmd) Run(in *invocation) error {
	return in.printScript(`complete -c PROGRAM -f -a '(PROGRAM completion words --describe -- (commandline -cp | string collect))'
`)
}

var notInNames = regexp.MustCompile(`[^A-Za-z0-9_]`)

// printScript prints a script for the program.
func (in *invocation) printScript(script string) error {
	_, err := strings.NewReplacer("PROGRAM", in.Name, "FUNCTION", "_"+notInNames.ReplaceAllString(in.Name, "_")).WriteString(in.stdout, script)
	return err
}

type completionWordsCmd struct {
	Describe bool   `help:"With a tab and its help behind each word."`
	Line     string `arg:"" help:"The line up to the cursor."`
}

// Run prints the words, a line each.
func (c *completionWordsCmd) Run(k *kong.Kong, in *invocation) error {
	words := shellWords(c.Line)
	for _, w := range (&completer{in.kindNames}).complete(k.Model.Node, words[1:]) {
		if !c.Describe {
			w.help = ""
		} else {
			w.help = "\t" + strings.Join(strings.Fields(w.help), " ")
		}
		if _, err := fmt.Fprintln(in.stdout, w.word+w.help); err != nil {
			return err
		}
	}
	return nil
}

// kindNames are the names of the program's kinds; none if they don't go together, which
// other commands say.
func (in *invocation) kindNames() []string {
	set, err := in.kinds()
	if err != nil {
		return nil
	}
	return set.Kinds()
}

// choice is a word that a line may go on with.
type choice struct{ word, help string }

type completer struct{ kinds func() []string }

// complete returns what the last word may become, given the words before it, without the
// program's name.
func (c *completer) complete(node *kong.Node, words []string) []choice {
	var valueOf *kong.Flag // the flag whose value comes next
	args, onlyArgs := 0, false
	last := len(words) - 1
	for _, word := range words[:last] {
		switch {
		case valueOf != nil:
			valueOf = nil
		case word == "--":
			onlyArgs = true
		case isFlag(word) && !onlyArgs:
			flag, hasValue := flagOf(node, word)
			if flag != nil && !hasValue && !flag.IsBool() && !flag.IsCounter() {
				valueOf = flag
			}
		default:
			child := slices.IndexFunc(node.Children, func(n *kong.Node) bool { return n.Name == word || slices.Contains(n.Aliases, word) })
			if child < 0 || args > 0 {
				args++
				break
			}
			node = node.Children[child]
		}
	}
	word := words[last]
	var all []choice
	switch flag, hasValue := flagOf(node, word); {
	case valueOf != nil:
		all = c.values(valueOf.Value, "")
	case isFlag(word) && !onlyArgs && hasValue && flag != nil:
		name, _, _ := strings.Cut(word, "=")
		all = c.values(flag.Value, name+"=")
	case isFlag(word) && !onlyArgs || word == "-":
		for _, f := range flagsOf(node) {
			if !f.Hidden {
				all = append(all, choice{"--" + f.Name, f.Help})
			}
		}
	default:
		for _, n := range node.Children {
			if !n.Hidden && args == 0 {
				all = append(all, choice{n.Name, n.Help})
			}
		}
		if args < len(node.Positional) {
			all = append(all, c.values(node.Positional[args], "")...)
		}
	}
	return slices.DeleteFunc(all, func(s choice) bool { return !strings.HasPrefix(s.word, word) })
}

// values are those of a flag or an argument, as far as they are known: what is called kind
// is one of the kinds.
func (c *completer) values(of *kong.Value, prefix string) (all []choice) {
	var known []string
	switch {
	case of.Enum != "":
		known = of.EnumSlice()
	case of.Name == "kind":
		known = c.kinds()
	}
	for _, word := range known {
		all = append(all, choice{prefix + word, ""})
	}
	return all
}

func isFlag(word string) bool { return strings.HasPrefix(word, "-") && word != "-" }

// flagOf returns the flag of a command that a word names, and whether the word has its
// value too.
func flagOf(node *kong.Node, word string) (flag *kong.Flag, hasValue bool) {
	name, _, hasValue := strings.Cut(word, "=")
	for _, f := range flagsOf(node) {
		if name == "--"+f.Name || f.Short != 0 && name == "-"+string(f.Short) {
			return f, hasValue
		}
	}
	return nil, hasValue
}

// flagsOf are the flags that may follow a command, those of its default command included.
func flagsOf(node *kong.Node) []*kong.Flag {
	groups := node.AllFlags(false)
	if node.DefaultCmd != nil {
		groups = append(groups, node.DefaultCmd.Flags)
	}
	return slices.Concat(groups...)
}

// shellWords splits a line as a shell does, but for what a shell would expand. The last word
// is the one that the cursor is in; it may be empty. There are two at least.
func shellWords(line string) []string {
	var words []string
	var word strings.Builder
	inWord, quote, escaped := false, rune(0), false
	for _, r := range line {
		switch {
		case escaped:
			word.WriteRune(r)
			escaped = false
		case r == '\\' && quote != '\'':
			inWord, escaped = true, true
		case quote != 0 && r == quote:
			quote = 0
		case quote != 0:
			word.WriteRune(r)
		case r == '\'' || r == '"':
			inWord, quote = true, r
		case r == ' ' || r == '\t':
			if inWord {
				words = append(words, word.String())
				word.Reset()
			}
			inWord = false
		default:
			inWord = true
			word.WriteRune(r)
		}
	}
	words = append(words, word.String())
	if len(words) < 2 {
		words = append(words, "")
	}
	return words
}

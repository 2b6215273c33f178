package cli

import (
	"fmt"
	"slices"

	"github.com/alecthomas/kong"
)

// newParser is [kong.New] for a grammar whose variables are answered by env, because
// kong itself asks the environment of the process. A variable that is set to nothing
// counts as not set, as a blank line in a dashboard's form is meant. Help shows the
// variables as kong does.
//
// kong looks up a value's variables in its tag when it resets the value. newParser
// empties the tags and lets a resolver answer instead, which reads the names that the
// flags keep.
func newParser(grammar any, env func(string) string, options ...kong.Option) (*kong.Kong, error) {
	parser, err := kong.New(grammar, slices.Concat(options, []kong.Option{
		kong.Resolvers(kong.ResolverFunc(func(_ *kong.Context, _ *kong.Path, flag *kong.Flag) (any, error) {
			for _, name := range flag.Envs {
				if value := env(name); value != "" {
					return value, nil
				}
			}
			return nil, nil
		})),
		kong.ValueFormatter(helpWithVariables),
	})...)
	if err != nil {
		return nil, err
	}
	err = kong.Visit(parser.Model, func(node kong.Visitable, next kong.Next) error {
		if value, ok := node.(*kong.Value); ok {
			if value.Flag == nil && len(value.Tag.Envs) > 0 {
				return fmt.Errorf("%s: an argument can't have a variable, only a flag can", value.Summary())
			}
			value.Tag.Envs = nil
		}
		return next(nil)
	})
	if err != nil {
		return nil, err
	}
	return parser, nil
}

// helpWithVariables is kong's own formatter, given the variables that newParser took
// out of the tag.
func helpWithVariables(value *kong.Value) string {
	if value.Flag == nil {
		return kong.DefaultHelpValueFormatter(value)
	}
	tag := *value.Tag
	tag.Envs = value.Flag.Envs
	shown := *value
	shown.Tag = &tag
	return kong.DefaultHelpValueFormatter(&shown)
}

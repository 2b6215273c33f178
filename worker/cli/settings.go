package cli

import (
	"cmp"
	"errors"
	"fmt"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/alecthomas/kong"

	"github.com/carpool-go/carpool/tasks"
)

// groupSettings is what the task groups can be told by variables and flags.
//
// A group that is a pointer to a struct has a setting in each exported field with the
// tag env, those of embedded structs included:
//
//	type Tasks struct {
//		Limit  int    `env:"SHOP_LIMIT" default:"10" help:"Orders at once."`
//		Secret string `env:"SHOP_SECRET" secret:"" help:"Orders are signed with this."`
//	}
//
// The flag is the variable's name in lower case, with dashes. A flag wins over the
// variable, the variable over what the field holds when the program starts, and that
// over the tag default; a field that holds its type's zero value counts as holding
// nothing. The tags help, placeholder and group are shown in the help. The tag secret
// keeps a value out of flags, help, config and faults: it is read from its variable only.
//
// kong is given a struct of texts that is made for it, never the groups: it would erase
// what is set in code, stop at the first wrong value and show it, and call a group's
// methods whose names it knows, such as Validate.
type groupSettings struct {
	groups []settingsOf
	flags  any // a pointer to the struct for kong
	env    func(string) string
	redact func(variable, value string) string
}

// settingsOf is one group with its settings, which may be none.
type settingsOf struct {
	group    tasks.Group
	settings []*setting
}

// setting is one field of a group.
type setting struct {
	variable string
	secret   bool
	format   format
	field    reflect.Value // the group's
	flag     reflect.Value // kong's: a string, or a secretFlag
	// fallback is the value when neither the variable nor the flag is given, and
	// fallbackText the text that kong has for it, "" if there is none.
	fallback     reflect.Value
	fallbackText string
	// example is shown in faults, and is no secret.
	example string
}

// settingNames are variables and flags that are taken.
type settingNames struct{ variables, flags map[string]bool }

// namesOf returns the variables and the flags of commands, which are pointers to their
// structs as kong reads them. kong's own --help is among them.
func namesOf(commands ...any) (settingNames, error) {
	names := settingNames{variables: make(map[string]bool), flags: make(map[string]bool)}
	for _, command := range commands {
		parser, err := kong.New(command)
		if err != nil {
			return settingNames{}, err
		}
		for _, flag := range parser.Model.Flags {
			for _, name := range slices.Concat(flag.Aliases, []string{flag.Name}) {
				names.flags[name] = true
			}
			for _, name := range flag.Envs {
				names.variables[name] = true
			}
		}
	}
	return names, nil
}

// newGroupSettings reads the settings that groups declare. It sets no field; read does.
// The error is a programmer's to mend: it has a line for each fault, with the type of
// the group and the field. program is what the program itself has in the commands that
// the groups' settings are given to. env returns a variable's value, "" if it is not
// set. redact returns a value as it may be shown, for the help and for print.
func newGroupSettings(groups []tasks.Group, program settingNames, env func(string) string, redact func(variable, value string) string) (*groupSettings, error) {
	s := &groupSettings{env: env, redact: redact}
	var (
		faults    []error
		kongs     []reflect.StructField
		variables = make(map[string]string) // their owners
		flags     = make(map[string]string)
	)
	for i, group := range groups {
		if group == nil {
			faults = append(faults, fmt.Errorf("group %d of %d is nil", i+1, len(groups)))
			continue
		}
		of := settingsOf{group: group}
		value, fields, err := settingFields(group)
		if err != nil {
			faults = append(faults, err)
			continue
		}
		for _, field := range fields {
			owner := fmt.Sprintf("%T.%s", group, field.Name)
			set, err := newSetting(value, field)
			if err == nil {
				err = take("variable "+set.variable, set.variable, owner, program.variables, variables)
			}
			if err == nil {
				err = take("flag --"+set.flagName(), set.flagName(), owner, program.flags, flags)
			}
			if err != nil {
				faults = append(faults, fmt.Errorf("%s: %w", owner, err))
				continue
			}
			of.settings = append(of.settings, set)
			kongs = append(kongs, s.kongField(set, field.Tag, len(kongs)))
		}
		s.groups = append(s.groups, of)
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}

	forKong := reflect.New(reflect.StructOf(kongs))
	s.flags = forKong.Interface()
	i := 0
	for _, of := range s.groups {
		for _, set := range of.settings {
			set.flag = forKong.Elem().Field(i)
			if !set.secret {
				set.flag.SetString(set.fallbackText)
			}
			i++
		}
	}
	return s, nil
}

// take enters that name belongs to owner, unless it is taken.
func take(what, name, owner string, program map[string]bool, owners map[string]string) error {
	if program[name] {
		return fmt.Errorf("the %s is one of the program's own", what)
	}
	if other, taken := owners[name]; taken {
		return fmt.Errorf("the %s is taken by %s", what, other)
	}
	owners[name] = owner
	return nil
}

// settingFields returns the fields of group that are settings, or are tagged as if they
// were, and the struct that they are in.
func settingFields(group tasks.Group) (reflect.Value, []reflect.StructField, error) {
	t := reflect.TypeOf(group)
	for t.Kind() == reflect.Pointer {
		t = t.Elem()
	}
	if t.Kind() != reflect.Struct {
		return reflect.Value{}, nil, nil
	}
	fields := taggedFields(t, nil, nil)
	value := reflect.ValueOf(group)
	switch {
	case len(fields) == 0:
		return reflect.Value{}, nil, nil
	case value.Kind() != reflect.Pointer || value.Type().Elem() != t:
		return reflect.Value{}, nil, fmt.Errorf("%T: a group with settings must be a pointer to its struct, *%s", group, t)
	case value.IsNil():
		return reflect.Value{}, nil, fmt.Errorf("%T: a group with settings must not be a nil pointer", group)
	}
	return value.Elem(), fields, nil
}

// taggedFields returns the fields of t with a setting's tags. It goes through embedded
// structs itself, because [reflect.VisibleFields] leaves out a field that another one of
// its name hides. within is the types that are being gone through, and index the way to t.
func taggedFields(t reflect.Type, index []int, within []reflect.Type) []reflect.StructField {
	var fields []reflect.StructField
	within = append(within, t)
	for i := range t.NumField() {
		field := t.Field(i)
		field.Index = append(slices.Clone(index), i)
		if _, has := field.Tag.Lookup("env"); field.Anonymous && !has {
			inner := field.Type
			if inner.Kind() == reflect.Pointer {
				inner = inner.Elem()
			}
			if inner.Kind() == reflect.Struct && !slices.Contains(within, inner) {
				fields = append(fields, taggedFields(inner, field.Index, within)...)
			}
			continue
		}
		if len(tagsAmong(field.Tag, "env", "help", "default", "placeholder", "secret")) > 0 {
			fields = append(fields, field)
		}
	}
	return fields
}

func tagsAmong(tag reflect.StructTag, names ...string) []string {
	return slices.DeleteFunc(names, func(name string) bool {
		_, has := tag.Lookup(name)
		return !has
	})
}

// variableName is narrower than a shell's, because the flag is made from it.
var variableName = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_]*$`)

// newSetting reads one field of the struct of a group.
func newSetting(group reflect.Value, field reflect.StructField) (*setting, error) {
	variable, has := field.Tag.Lookup("env")
	_, secret := field.Tag.Lookup("secret")
	format, known := formatOf(field.Type)
	switch {
	case !has:
		return nil, fmt.Errorf("it has the tag %s but no env, so it would not be a setting", strings.Join(tagsAmong(field.Tag, "help", "default", "placeholder", "secret"), ", "))
	case !variableName.MatchString(variable):
		return nil, fmt.Errorf("the tag env:%q is not the name of one variable: letters, digits, and _", variable)
	case !field.IsExported():
		return nil, fmt.Errorf("it has the tag env but is not exported, so it can't be set")
	case !known:
		return nil, fmt.Errorf("a %s can't be a setting; string, bool, numbers, time.Duration, []string and what has UnmarshalText can", field.Type)
	}
	if tags := tagsAmong(field.Tag, "enum", "name", "required", "short"); len(tags) > 0 {
		return nil, fmt.Errorf("the tag %s has no effect here; what a value must be is for the group's method Check", strings.Join(tags, ", "))
	}
	value, err := group.FieldByIndexErr(field.Index)
	if err != nil {
		return nil, fmt.Errorf("the struct that it is embedded with is a nil pointer")
	}

	set := &setting{variable: variable, secret: secret, format: format, field: value, fallback: reflect.New(field.Type).Elem()}
	set.fallback.Set(value)
	inTag := field.Tag.Get("default")
	if inTag != "" {
		parsed := reflect.New(field.Type).Elem()
		if problem := format.parse(inTag, parsed); problem != "" {
			return nil, fmt.Errorf("the tag default %s", problem)
		}
		if value.IsZero() {
			set.fallback, set.fallbackText = parsed, inTag
		}
	}
	if !value.IsZero() {
		set.fallbackText = textOf(value)
	}
	return set, nil
}

func (set *setting) flagName() string {
	return strings.ToLower(strings.ReplaceAll(set.variable, "_", "-"))
}

// kongField is the field for kong that takes a setting's text.
func (s *groupSettings) kongField(set *setting, tag reflect.StructTag, i int) reflect.StructField {
	field := reflect.StructField{Name: "Setting" + strconv.Itoa(i)}
	tags := []string{kongTag("name", set.flagName()), kongTag("group", cmp.Or(tag.Get("group"), "Tasks"))}
	placeholder, help := tag.Get("placeholder"), tag.Get("help")
	if set.secret {
		field.Type = reflect.TypeFor[secretFlag]()
		set.example = cmp.Or(placeholder, set.format.example, "…")
		placeholder = cmp.Or(placeholder, "SECRET")
		help = strings.TrimSpace(help + " Environment only ($" + set.variable + ").")
	} else {
		field.Type = reflect.TypeFor[string]()
		shown := s.redact(set.variable, set.fallbackText)
		set.example = cmp.Or(shown, set.format.example, placeholder, "…")
		if placeholder == "" && shown != "" {
			placeholder = strconv.Quote(shown)
		}
		placeholder = cmp.Or(placeholder, strings.ToUpper(set.format.name))
		tags = append(tags, kongTag("env", set.variable))
		if set.fallbackText != "" {
			tags = append(tags, kongTag("default", set.fallbackText))
		}
	}
	tags = append(tags, kongTag("placeholder", placeholder), kongTag("help", help))
	field.Tag = reflect.StructTag(strings.Join(tags, " "))
	return field
}

// kongTag is one tag of a field, from which kong gets the value as it is: kong would
// replace ${name}, and takes a backslash before a quote for an escape even if it is
// escaped itself.
func kongTag(key, value string) string {
	quoted := strconv.Quote(strings.ReplaceAll(value, "$", "$$"))
	return key + ":" + strings.ReplaceAll(quoted, `\\`, `\x5c`)
}

// secretFlag is the flag that a secret must not be given by. It remembers only that it
// was given, so that the value goes nowhere.
type secretFlag struct{ given bool }

// Decode implements [kong.MapperValue].
func (f *secretFlag) Decode(ctx *kong.DecodeContext) error {
	ctx.Scan.Pop()
	f.given = true
	return nil
}

// plugins returns the settings for kong, to be embedded in each command that has them;
// the same pointer may be in several.
func (s *groupSettings) plugins() kong.Plugins { return kong.Plugins{s.flags} }

// read sets the fields of the groups after kong has parsed, and returns every fault in
// a line of its own. A line names the variable and leaves out the value. A field with a
// fault keeps what it had. The groups that have no fault are asked for further ones by
// their method Check() error, if they have it.
func (s *groupSettings) read() (faults []string) {
	for _, of := range s.groups {
		before := len(faults)
		for _, set := range of.settings {
			if problem := s.apply(set); problem != "" {
				faults = append(faults, faultLine(set.variable, problem, set.example))
			}
		}
		if g, ok := of.group.(interface{ Check() error }); ok && len(faults) == before {
			faults = append(faults, errorLines(g.Check())...)
		}
	}
	return faults
}

// readVariables is read for a command without the plugins, where there are no flags: it
// takes the settings from their variables.
func (s *groupSettings) readVariables() (faults []string) {
	for _, of := range s.groups {
		for _, set := range of.settings {
			if !set.secret {
				set.flag.SetString(cmp.Or(s.env(set.variable), set.fallbackText))
			}
		}
	}
	return s.read()
}

// apply gives the field of a setting its value, or returns what is wrong with it.
func (s *groupSettings) apply(set *setting) (problem string) {
	text, given := s.text(set)
	if set.secret && set.flag.Addr().Interface().(*secretFlag).given {
		return "is given as a flag, " + flagsAreSeen
	}
	if !given {
		set.field.Set(set.fallback)
		return ""
	}
	value := reflect.New(set.field.Type()).Elem()
	if problem := set.format.parse(text, value); problem != "" {
		return problem
	}
	set.field.Set(value)
	return ""
}

// text returns the text of a setting, and whether it was given by the variable or the
// flag.
func (s *groupSettings) text(set *setting) (text string, given bool) {
	if set.secret {
		text = s.env(set.variable)
		return text, text != ""
	}
	text = set.flag.String()
	return text, text != set.fallbackText
}

// shown returns the settings as they may be shown, after kong has parsed: *** for a secret
// that is set, and other values as redact returns them.
func (s *groupSettings) shown(source func(variable string) string) (list []shownSetting) {
	for _, of := range s.groups {
		for _, set := range of.settings {
			text, given := s.text(set)
			fallback := s.redact(set.variable, set.fallbackText)
			switch {
			case !set.secret:
				text = s.redact(set.variable, text)
			case given || !set.fallback.IsZero():
				text = "***"
			}
			if set.secret {
				fallback = ""
			}
			list = append(list, shownSetting{set.variable, text, fallback, source(set.variable)})
		}
	}
	return list
}

// errorLines returns the text of err, or of each error that [errors.Join] joined in it.
func errorLines(err error) []string {
	if err == nil {
		return nil
	}
	if joined, ok := err.(interface{ Unwrap() []error }); ok {
		var lines []string
		var texts []string
		for _, err := range joined.Unwrap() {
			lines = append(lines, errorLines(err)...)
			texts = append(texts, err.Error())
		}
		// What wraps several errors in a sentence of its own is one fault.
		if err.Error() == strings.Join(texts, "\n") {
			return lines
		}
	}
	return []string{err.Error()}
}

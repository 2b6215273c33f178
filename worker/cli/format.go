package cli

import (
	"encoding"
	"errors"
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// format is how the settings of one type are written.
type format struct {
	// name is the type's, for the help.
	name string
	// example is a text that is right, "" where only the setting's owner knows one.
	example string
	// parse sets to, or returns what is wrong with the text: "is not a whole number".
	// The problem leaves the text out, because the text may be a secret.
	parse func(text string, to reflect.Value) (problem string)
}

// formatOf returns the format of a type, and whether there is one.
func formatOf(t reflect.Type) (format, bool) {
	switch {
	case reflect.PointerTo(t).Implements(reflect.TypeFor[encoding.TextUnmarshaler]()):
		return format{t.Name(), "", parseText}, true
	case t == reflect.TypeFor[time.Duration]():
		return format{"duration", "30s", parseDuration}, true
	}
	switch t.Kind() {
	case reflect.String:
		return format{"string", "", parseString}, true
	case reflect.Bool:
		return format{"bool", "true", parseBool}, true
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		return format{"int", "10", parseInt}, true
	case reflect.Uint, reflect.Uint8, reflect.Uint16, reflect.Uint32, reflect.Uint64:
		return format{"uint", "10", parseUint}, true
	case reflect.Float32, reflect.Float64:
		return format{"float", "0.5", parseFloat}, true
	case reflect.Slice:
		if t.Elem() == reflect.TypeFor[string]() {
			return format{"string,…", "one,two", parseList}, true
		}
	}
	return format{}, false
}

// textOf returns a value as parse reads it, or "" if the type doesn't tell how. It is the
// inverse for all but the elements of a list that have commas or outer spaces.
func textOf(v reflect.Value) string {
	addressed := reflect.New(v.Type())
	addressed.Elem().Set(v)
	switch x := addressed.Interface().(type) {
	case encoding.TextMarshaler:
		text, err := x.MarshalText()
		if err != nil {
			return ""
		}
		return string(text)
	case encoding.TextUnmarshaler:
		return ""
	case *time.Duration:
		return x.String()
	}
	switch v.Kind() {
	case reflect.String:
		return v.String()
	case reflect.Bool:
		return strconv.FormatBool(v.Bool())
	case reflect.Float32, reflect.Float64:
		return strconv.FormatFloat(v.Float(), 'g', -1, v.Type().Bits())
	case reflect.Slice:
		list := make([]string, v.Len())
		for i := range list {
			list[i] = v.Index(i).String()
		}
		return strings.Join(list, ",")
	}
	if v.CanInt() {
		return strconv.FormatInt(v.Int(), 10)
	}
	return strconv.FormatUint(v.Uint(), 10)
}

func parseString(text string, to reflect.Value) string {
	to.SetString(text)
	return ""
}

func parseText(text string, to reflect.Value) string {
	if err := to.Addr().Interface().(encoding.TextUnmarshaler).UnmarshalText([]byte(text)); err != nil {
		return fmt.Sprintf("is not a valid %s", to.Type()) // err may quote the text
	}
	return ""
}

func parseBool(text string, to reflect.Value) string {
	b, err := strconv.ParseBool(strings.TrimSpace(text))
	if err != nil {
		return "is neither true nor false"
	}
	to.SetBool(b)
	return ""
}

func parseInt(text string, to reflect.Value) string {
	bits := to.Type().Bits()
	n, err := strconv.ParseInt(strings.TrimSpace(text), 10, bits)
	switch {
	case errors.Is(err, strconv.ErrRange):
		return fmt.Sprintf("is not a whole number from %d to %d", int64(-1)<<(bits-1), int64(1)<<(bits-1)-1)
	case err != nil:
		return "is not a whole number"
	}
	to.SetInt(n)
	return ""
}

func parseUint(text string, to reflect.Value) string {
	bits := to.Type().Bits()
	n, err := strconv.ParseUint(strings.TrimSpace(text), 10, bits)
	if err != nil {
		return fmt.Sprintf("is not a whole number from 0 to %d", ^uint64(0)>>(64-bits))
	}
	to.SetUint(n)
	return ""
}

func parseFloat(text string, to reflect.Value) string {
	n, err := strconv.ParseFloat(strings.TrimSpace(text), to.Type().Bits())
	if err != nil {
		return "is not a number"
	}
	to.SetFloat(n)
	return ""
}

func parseDuration(text string, to reflect.Value) string {
	d, err := time.ParseDuration(strings.TrimSpace(text))
	if err != nil {
		return "is not a time with its unit, such as 500ms, 30s or 5m"
	}
	to.SetInt(int64(d))
	return ""
}

// parseList leaves out empty elements, as a comma at the end makes one.
func parseList(text string, to reflect.Value) string {
	var list []string
	for element := range strings.SplitSeq(text, ",") {
		if element = strings.TrimSpace(element); element != "" {
			list = append(list, element)
		}
	}
	to.Set(reflect.ValueOf(list).Convert(to.Type()))
	return ""
}

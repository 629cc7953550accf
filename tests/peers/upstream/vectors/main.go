// Command vectors answers with upstream's own functions: what they make of an input, or why they refuse it.
//
// Each line of its standard input is a command with many inputs, each line of its output has as many answers. It ends with its
// input.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
)

type command struct {
	Do     string          `json:"do"`
	Inputs json.RawMessage `json:"inputs"`
	// classes: the schema that they are to meet.
	Schema string `json:"schema"`
}

// answers holds either what a function made of each input, or what is wrong with the command.
type answers struct {
	Answers any    `json:"answers,omitempty"`
	Error   string `json:"error,omitempty"`
}

// each answers every input by itself.
func each[I, A any](inputs json.RawMessage, answer func(I) A) (any, error) {
	var all []I
	if err := json.Unmarshal(inputs, &all); err != nil {
		return nil, err
	}

	made := make([]A, 0, len(all))
	for _, input := range all {
		made = append(made, answer(input))
	}

	return made, nil
}

func perform(c command) (any, error) {
	switch c.Do {
	case "token":
		return each(c.Inputs, token)
	case "join":
		return each(c.Inputs, join)
	case "schematic":
		return each(c.Inputs, assemble)
	case "read schematics":
		return each(c.Inputs, readBack)
	case "make keys":
		return each(c.Inputs, makeKey)
	case "read keys":
		return each(c.Inputs, readKey)
	case "classes":
		check, err := classes(c.Schema)
		if err != nil {
			return nil, err
		}

		return each(c.Inputs, check)
	case "configs":
		return each(c.Inputs, load)
	case "patches":
		return each(c.Inputs, patch)
	default:
		return nil, fmt.Errorf("unknown command %q", c.Do)
	}
}

func work() error {
	input := json.NewDecoder(os.Stdin)
	output := json.NewEncoder(os.Stdout)

	for {
		var c command

		switch err := input.Decode(&c); {
		case errors.Is(err, io.EOF):
			return nil
		case err != nil:
			return err
		}

		var out answers

		made, err := perform(c)
		if err != nil {
			out.Error = fmt.Sprintf("%s: %s", c.Do, err)
		}

		out.Answers = made

		if err := output.Encode(out); err != nil {
			return err
		}
	}
}

func main() {
	if err := work(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// text is an error's, or nothing.
func text(err error) string {
	if err == nil {
		return ""
	}

	return err.Error()
}

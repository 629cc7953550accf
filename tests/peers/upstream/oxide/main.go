// Command oxide drives an Oxide API with the vendor's own client, and checks what comes back: that it has the shapes that the
// client knows, and the meaning that a rack gives it.
//
// Each line of its standard input names a story and where to tell it; each line of its output says which calls were made, or what
// was wrong. It ends with its input.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
)

type command struct {
	Story string `json:"story"`
	Host  string `json:"host"`
	Token string `json:"token"`
}

type answer struct {
	// Calls are methods and paths, each once.
	Calls []string `json:"calls,omitempty"`
	Error string   `json:"error,omitempty"`
}

var stories = map[string]func(context.Context, *session){
	"user":        user,
	"projects":    projects,
	"disks":       disks,
	"imports":     imports,
	"instances":   instances,
	"pages":       pages,
	"refusals":    refusals,
	"addresses":   addresses,
	"capacity":    capacity,
	"short pages": shortPages,
	"too new":     tooNew,
	"shut out":    shutOut,
}

func tell(c command) (out answer) {
	story, known := stories[c.Story]
	if !known {
		return answer{Error: fmt.Sprintf("unknown story %q", c.Story)}
	}

	s, err := newSession(c.Host, c.Token)
	if err != nil {
		return answer{Error: err.Error()}
	}

	// A check that fails ends its story.
	defer func() {
		if wrong := recover(); wrong != nil {
			out = answer{Error: fmt.Sprintf("%s: %v\nafter %s", c.Story, wrong, s.last)}
		}
	}()

	story(context.Background(), s)

	for call := range s.calls {
		out.Calls = append(out.Calls, call)
	}

	slices.Sort(out.Calls)

	return out
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

		if err := output.Encode(tell(c)); err != nil {
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

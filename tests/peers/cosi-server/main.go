// Command cosi-server is a COSI state of upstream's making for our tests to talk to: cosi-project/runtime's own
// gRPC server over its own in-memory state, with Omni's resource types, behind go-api-signature's own check of
// every call.
//
// None of Omni's rules are here: who may write what is not COSI's to say.
//
// Whoever starts it writes commands to its standard input, a JSON object a line, and reads as many answers
// from its standard output. It ends with its standard input, and so never outlives the test.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"time"
)

// command is one line of the standard input. Which members count depends on what is to be done.
type command struct {
	Do string `json:"do"`

	// listen: where; an empty address is any port of the loopback interface.
	Address string `json:"address"`

	// key: whose, how long it is good for, and how long ago it was made, in Go's durations.
	Account  string `json:"account"`
	Lifetime string `json:"lifetime"`
	Age      string `json:"age"`

	// trust: the key whose calls are accepted from now on.
	Key string `json:"key"`

	// put, destroy: what. Of what is destroyed only the name counts.
	Resources []resourceText `json:"resources"`
}

// answer is one line of the standard output.
type answer struct {
	Error   string `json:"error,omitempty"`
	Address string `json:"address,omitempty"`
	Key     string `json:"key,omitempty"`
}

func main() {
	store := flag.String("store", "", "file that keeps the resources from one process to the next")
	history := flag.Int("history", 0, "how many changes of a type are kept for watches; 0: upstream's default")

	flag.Parse()

	if err := run(*store, *history); err != nil {
		fmt.Fprintln(os.Stderr, "cosi-server:", err)
		os.Exit(1)
	}
}

func run(store string, history int) error {
	keys := newKeys()

	server, err := newServer(context.Background(), keys, store, history)
	if err != nil {
		return err
	}

	lines := bufio.NewReader(os.Stdin)
	answers := json.NewEncoder(os.Stdout)

	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF {
			return nil
		}

		if err != nil {
			return err
		}

		var do command

		var said answer

		if err = json.Unmarshal(line, &do); err == nil {
			said, err = obey(server, keys, do)
		}

		if err != nil {
			said = answer{Error: err.Error()}
		}

		if err = answers.Encode(said); err != nil {
			return err
		}
	}
}

func obey(server *server, keys *keys, do command) (answer, error) {
	ctx := context.Background()

	switch do.Do {
	case "listen":
		address, err := server.listen(do.Address)

		return answer{Address: address}, err
	case "hang up":
		return answer{}, server.hangUp()
	case "key":
		lifetime, err := time.ParseDuration(do.Lifetime)
		if err != nil {
			return answer{}, err
		}

		age, err := time.ParseDuration(do.Age)
		if err != nil {
			return answer{}, err
		}

		key, err := makeKey(do.Account, lifetime, age)

		return answer{Key: key}, err
	case "trust":
		return answer{}, keys.trust(do.Key)
	case "put":
		for _, text := range do.Resources {
			if err := server.put(ctx, text); err != nil {
				return answer{}, err
			}
		}

		return answer{}, nil
	case "destroy":
		for _, text := range do.Resources {
			if err := server.destroy(ctx, text); err != nil {
				return answer{}, err
			}
		}

		return answer{}, nil
	default:
		return answer{}, fmt.Errorf("unknown command %q", do.Do)
	}
}

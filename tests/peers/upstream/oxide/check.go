package main

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/oxidecomputer/oxide.go/oxide"
)

// session is a client that remembers its calls.
type session struct {
	*oxide.Client
	calls map[string]bool
	last  string
	body  []byte
}

// now is the session of the story that is told.
var now *session

func newSession(host, token string) (*session, error) {
	s := &session{calls: map[string]bool{}}
	now = s

	var err error

	s.Client, err = oxide.NewClient(
		oxide.WithHost(host),
		oxide.WithToken(token),
		oxide.WithHTTPClient(&http.Client{Transport: s, Timeout: time.Minute}),
	)

	return s, err
}

// RoundTrip implements http.RoundTripper.
func (s *session) RoundTrip(request *http.Request) (*http.Response, error) {
	s.last = request.Method + " " + request.URL.Path
	s.calls[s.last] = true

	response, err := http.DefaultTransport.RoundTrip(request)
	if err != nil {
		return nil, err
	}

	defer response.Body.Close() //nolint:errcheck

	if s.body, err = io.ReadAll(response.Body); err != nil {
		return nil, err
	}

	response.Body = io.NopCloser(bytes.NewReader(s.body))

	return response, nil
}

// must is for calls that have to succeed: their answer has the shape that the client knows.
func must[T any](value T, err error) T {
	ok(err)

	again, err := json.Marshal(value)
	ok(err)

	var sent, known any

	ok(json.Unmarshal(now.body, &sent))
	ok(json.Unmarshal(again, &known))
	same("", sent, known)

	return value
}

// ok is for calls that have to succeed and answer nothing.
func ok(err error) {
	if err != nil {
		panic(err)
	}
}

// same compares what was sent with what the client would have sent in its place.
func same(path string, sent, known any) {
	sentMembers, isObject := sent.(map[string]any)
	knownMembers, isKnown := known.(map[string]any)

	if isObject && isKnown {
		for name, member := range knownMembers {
			if _, there := sentMembers[name]; !there {
				panic(fmt.Sprintf("%s.%s is missing, the client wants %v", path, name, member))
			}
		}

		for name, member := range sentMembers {
			if knownMember, there := knownMembers[name]; there {
				same(path+"."+name, member, knownMember)
			} else if !empty(member) {
				panic(fmt.Sprintf("%s.%s is %v, and means nothing to the client", path, name, member))
			}
		}

		return
	}

	sentItems, isArray := sent.([]any)
	knownItems, isKnown := known.([]any)

	if isArray && isKnown && len(sentItems) == len(knownItems) {
		for i := range sentItems {
			same(fmt.Sprintf("%s[%d]", path, i), sentItems[i], knownItems[i])
		}

		return
	}

	if !reflect.DeepEqual(sent, known) && !sameTime(sent, known) {
		panic(fmt.Sprintf("%s is %v, the client understands %v", path, sent, known))
	}
}

// empty is what the client leaves out.
func empty(value any) bool {
	return value == nil || reflect.ValueOf(value).IsZero() || reflect.DeepEqual(value, []any{})
}

func sameTime(sent, known any) bool {
	one, isText := sent.(string)
	other, isKnown := known.(string)

	if !isText || !isKnown {
		return false
	}

	first, err := time.Parse(time.RFC3339Nano, one)
	if err != nil {
		return false
	}

	second, err := time.Parse(time.RFC3339Nano, other)

	return err == nil && first.Equal(second)
}

// refusal is how a call was refused.
type refusal struct{ err error }

// refused is for calls that have to fail.
func refused[T any](value T, err error) refusal {
	if err == nil {
		panic(fmt.Sprintf("was not refused, but answered %v", value))
	}

	return refusal{err}
}

// refusedAll is for calls that answer nothing and have to fail.
func refusedAll(err error) refusal {
	return refused[any](nil, err)
}

// with says how: by which of the client's errors, and in which words.
func (r refusal) with(status, code error, words string) {
	var http *oxide.HTTPError
	if !errors.As(r.err, &http) || http.ErrorResponse == nil {
		panic(r.err)
	}

	if !errors.Is(r.err, status) || code != nil && !errors.Is(r.err, code) || code == nil && http.ErrorResponse.ErrorCode != "" {
		panic(fmt.Sprintf("expected %v %v, and not %v", status, code, r.err))
	}

	if !strings.Contains(http.ErrorResponse.Message, words) {
		panic(fmt.Sprintf("expected %q, and not %v", words, r.err))
	}

	if http.ErrorResponse.RequestId == "" {
		panic("an error without a request ID")
	}
}

// equal compares what was found with what has to be.
func equal[T any](found, wanted T) {
	if !reflect.DeepEqual(found, wanted) {
		panic(fmt.Sprintf("%#v, and not %#v", found, wanted))
	}
}

func isTrue(what bool, words string) {
	if !what {
		panic(words)
	}
}

// until waits for a condition, bounded.
func until[T any](look func() T, condition func(T) bool) T {
	begun := time.Now()

	for {
		seen := look()
		if condition(seen) {
			return seen
		}

		if time.Since(begun) > 30*time.Second {
			panic(fmt.Sprintf("never came, last seen %#v", seen))
		}

		time.Sleep(20 * time.Millisecond)
	}
}

// names are those of all items, in their order.
func names[T any](items []T, name func(T) oxide.Name) []string {
	var all []string
	for _, item := range items {
		all = append(all, string(name(item)))
	}

	return all
}

// has is whether one of the items has a name.
func has[T any](items []T, name func(T) oxide.Name, wanted string) {
	if !slices.Contains(names(items, name), wanted) {
		panic(fmt.Sprintf("%q is not among %v", wanted, names(items, name)))
	}
}

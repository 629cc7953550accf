package main

import (
	"time"

	"github.com/siderolabs/go-api-signature/pkg/pgp"
	"github.com/siderolabs/go-api-signature/pkg/serviceaccount"
)

type keyInput struct {
	Account  string `json:"account"`
	Name     string `json:"name"`
	Comment  string `json:"comment"`
	Email    string `json:"email"`
	Lifetime int64  `json:"lifetime"`
}

type keyAnswer struct {
	Key         string `json:"key"`
	Fingerprint string `json:"fingerprint"`
	Error       string `json:"error"`
}

// makeKey makes one as omnictl does.
func makeKey(in keyInput) keyAnswer {
	key, err := pgp.GenerateKey(in.Name, in.Comment, in.Email, time.Duration(in.Lifetime)*time.Second)
	if err != nil {
		return keyAnswer{Error: err.Error()}
	}

	encoded, err := serviceaccount.Encode(in.Account, key)

	return keyAnswer{Key: encoded, Fingerprint: key.Fingerprint(), Error: text(err)}
}

type accountAnswer struct {
	Name        string `json:"name"`
	Fingerprint string `json:"fingerprint"`
	// Error: it cannot be read, or what is read cannot sign.
	Error string `json:"error"`
}

// readKey reads a service account key as upstream's clients do, and signs with it.
func readKey(text string) accountAnswer {
	account, err := serviceaccount.Decode(text)
	if err != nil {
		return accountAnswer{Error: err.Error()}
	}

	answer := accountAnswer{Name: account.Name, Fingerprint: account.Key.Fingerprint()}

	signature, err := account.Key.Sign([]byte("payload"))
	if err == nil {
		err = account.Key.Verify([]byte("payload"), signature)
	}

	if err != nil {
		answer.Error = "cannot sign: " + err.Error()
	}

	return answer
}

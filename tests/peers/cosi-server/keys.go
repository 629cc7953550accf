package main

import (
	"context"
	"crypto"
	"fmt"
	"os"
	"runtime"
	"sync"
	"time"

	"github.com/ProtonMail/go-crypto/openpgp/packet"
	openpgp "github.com/ProtonMail/go-crypto/openpgp/v2"
	pgpcrypto "github.com/ProtonMail/gopenpgp/v3/crypto"
	"github.com/siderolabs/go-api-signature/pkg/message"
	"github.com/siderolabs/go-api-signature/pkg/pgp"
	"github.com/siderolabs/go-api-signature/pkg/serviceaccount"
	"github.com/siderolabs/omni/client/pkg/access"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// keys are the public keys that the server accepts, by fingerprint.
type keys struct {
	known map[string]*pgp.Key
	mu    sync.Mutex
}

func newKeys() *keys {
	return &keys{known: map[string]*pgp.Key{}}
}

// makeKey returns the text of a service account key as `omnictl infraprovider create` prints it for the account
// "infra-provider:<name>".
func makeKey(name string, lifetime, age time.Duration) (string, error) {
	account := access.ParseServiceAccountFromName(name)
	comment := runtime.GOOS + "/" + runtime.GOARCH

	key, err := generate(account.BaseName, comment, account.FullID(), lifetime, age)
	if err != nil {
		return "", err
	}

	return serviceaccount.Encode(name, key)
}

// trust accepts calls that are signed with that key. As with Omni, it is the public half that is kept.
func (keys *keys) trust(text string) error {
	account, err := serviceaccount.Decode(text)
	if err != nil {
		return err
	}

	armored, err := account.Key.ArmorPublic()
	if err != nil {
		return err
	}

	public, err := pgpcrypto.NewKeyFromArmored(armored)
	if err != nil {
		return err
	}

	key, err := pgp.NewKey(public)
	if err != nil {
		return err
	}

	keys.mu.Lock()
	defer keys.mu.Unlock()

	keys.known[key.Fingerprint()] = key

	return nil
}

// generate makes a key. Upstream's library knows only keys that are made now: an older one has the same
// parameters and another clock.
func generate(name, comment, email string, lifetime, age time.Duration) (*pgp.Key, error) {
	if age == 0 {
		return pgp.GenerateKey(name, comment, email, lifetime)
	}

	seconds := uint32(lifetime / time.Second)

	entity, err := openpgp.NewEntity(name, comment, email, &packet.Config{
		Algorithm:              packet.PubKeyAlgoEdDSA,
		DefaultHash:            crypto.SHA256,
		DefaultCipher:          packet.CipherAES256,
		DefaultCompressionAlgo: packet.CompressionZLIB,
		KeyLifetimeSecs:        seconds,
		SigLifetimeSecs:        seconds,
		Time:                   func() time.Time { return time.Now().Add(-age) },
	})
	if err != nil {
		return nil, err
	}

	key, err := pgpcrypto.NewKeyFromEntity(entity)
	if err != nil {
		return nil, err
	}

	return pgp.NewKey(key)
}

// check is what Omni does with the signature of a call: whatever is wrong with it, the caller hears the same.
func (keys *keys) check(ctx context.Context, method string) error {
	md, _ := metadata.FromIncomingContext(ctx)

	if err := keys.verify(message.NewGRPC(md, method)); err != nil {
		fmt.Fprintf(os.Stderr, "refused %s: %v\n", method, err)

		return status.Error(codes.Unauthenticated, message.ErrInvalidSignature.Error())
	}

	return nil
}

func (keys *keys) verify(call *message.GRPC) error {
	signature, err := call.Signature()
	if err != nil {
		return err
	}

	keys.mu.Lock()
	key := keys.known[signature.KeyFingerprint]
	keys.mu.Unlock()

	if key == nil {
		return fmt.Errorf("unknown key %q", signature.KeyFingerprint)
	}

	return call.VerifySignature(key)
}

func (keys *keys) unary(ctx context.Context, request any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	if err := keys.check(ctx, info.FullMethod); err != nil {
		return nil, err
	}

	return next(ctx, request)
}

func (keys *keys) stream(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	if err := keys.check(stream.Context(), info.FullMethod); err != nil {
		return err
	}

	return next(server, stream)
}

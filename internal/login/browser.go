package login

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strconv"
	"time"

	"golang.org/x/oauth2"
)

const callback = "/callback"

// Browser signs in with a browser on this machine: open is given the address to open there. The issuer sends the browser back to a loopback address, on a
// port of the system's choice, or on this one if it is not 0. It returns when the person is done, or when ctx is.
func (i *Issuer) Browser(ctx context.Context, port int, open func(address string) error) (Tokens, error) {
	if !i.HasBrowser() {
		return Tokens{}, fmt.Errorf("issuer %s: it has no sign-in with a browser (authorization_endpoint); use another device", i.config.Issuer)
	}
	l, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port))) // an address, as "localhost" may be somebody else's (RFC 8252 section 8.3)
	if err != nil {
		return Tokens{}, err
	}
	oauth := i.oauth
	oauth.RedirectURL = "http://" + l.Addr().String() + callback
	state, nonce, verifier := rand.Text(), rand.Text(), oauth2.GenerateVerifier()
	codes := make(chan answer, 1)
	s := &http.Server{Handler: i.landing(state, codes), ReadTimeout: askTime, MaxHeaderBytes: 64 << 10}
	served := make(chan struct{})
	go func() { defer close(served); _ = s.Serve(l) }() // it ends with Shutdown, below
	defer func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second) // the browser gets its page
		defer cancel()
		if s.Shutdown(ctx) != nil {
			_ = s.Close()
		}
		<-served
	}()
	if err := open(oauth.AuthCodeURL(state, oauth2.S256ChallengeOption(verifier), oauth2.SetAuthURLParam("nonce", nonce))); err != nil {
		return Tokens{}, err
	}
	select {
	case <-ctx.Done():
		return Tokens{}, ctx.Err()
	case a := <-codes:
		if a.err != nil {
			return Tokens{}, a.err
		}
		t, err := oauth.Exchange(i.context(ctx), a.code, oauth2.VerifierOption(verifier))
		return i.tokens(t, err, nonce, "")
	}
}

// answer is what the browser brings back.
type answer struct {
	code string
	err  error
}

// landing is where the issuer sends the browser. What has another state is not the answer to this request, and is left alone.
func (i *Issuer) landing(state string, codes chan<- answer) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET "+callback, func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		if subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(state)) != 1 {
			http.Error(w, "This is not the answer to the sign-in that waits here.", http.StatusBadRequest)
			return
		}
		var a answer
		switch from := q.Get("iss"); {
		case from != "" && from != i.config.Issuer, from == "" && i.about.NamesItself: // RFC 9207: another issuer's answer must not be taken to this one
			a.err = fmt.Errorf("the browser came back from %.200q and not from %s; nothing was kept", from, i.config.Issuer)
		case q.Get("error") != "":
			a.err = fmt.Errorf("issuer %s: %.200q: %w", i.config.Issuer, q.Get("error")+" "+q.Get("error_description"), ErrSignIn)
		case q.Get("code") == "":
			a.err = errors.New("the browser came back without a code")
		}
		a.code = q.Get("code")
		if a.err != nil {
			http.Error(w, "You are not signed in: "+a.err.Error(), http.StatusBadRequest)
		} else {
			fmt.Fprintln(w, "You are signed in. You can close this window.")
		}
		select {
		case codes <- a:
		default: // it has come before
		}
	})
	return mux
}

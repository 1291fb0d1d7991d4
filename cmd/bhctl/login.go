package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	accessv1 "github.com/bulkhead-os/bulkhead/api/access/v1"
	"github.com/bulkhead-os/bulkhead/internal/client"
	"github.com/bulkhead-os/bulkhead/internal/login"
)

// signIn is what is kept of a sign-in at an OpenID Connect issuer. CA is PEM; "" means the system's authorities.
type signIn struct {
	Issuer       string    `json:"issuer"`
	ClientID     string    `json:"clientID"`
	CA           string    `json:"ca,omitempty"`
	Scopes       []string  `json:"scopes,omitempty"`
	IDToken      string    `json:"idToken"`
	RefreshToken string    `json:"refreshToken,omitempty"`
	Expires      time.Time `json:"expires"` // of IDToken
}

func (s *signIn) config() login.Config {
	return login.Config{Issuer: s.Issuer, ClientID: s.ClientID, CA: []byte(s.CA), Scopes: s.Scopes}
}

func (s *signIn) take(t login.Tokens) {
	s.IDToken, s.RefreshToken, s.Expires = t.ID, t.Refresh, t.Expires.UTC()
}

// early is how long before its end an ID token is renewed: a call that begins with it must be let in.
const early = 30 * time.Second

// freshen renews the sign-in of a context if it is about to end. The file is locked meanwhile: a refresh token is good once, and another bhctl may be
// about to use it too.
func (a *app) freshen(ctx context.Context, c *clusterContext) error {
	if c.SignIn == nil || time.Until(c.SignIn.Expires) > early {
		return nil
	}
	unlock, err := lockContexts()
	if err != nil {
		return err
	}
	defer unlock()
	cfg, err := loadContexts()
	if err != nil {
		return err
	}
	kept := cfg.Contexts[cmp.Or(a.contextName, cfg.Current)]
	if kept == nil || kept.SignIn == nil {
		return errors.New("the sign-in of this context was removed just now; try again")
	}
	if time.Until(kept.SignIn.Expires) > early { // by another one
		c.SignIn = kept.SignIn
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(a.timeout, defaultTimeout))
	defer cancel()
	if err := renew(ctx, kept.SignIn); err != nil {
		if time.Now().Before(kept.SignIn.Expires) {
			return nil // it is good for this call yet
		}
		return errors.New(ended(kept, err))
	}
	c.SignIn = kept.SignIn
	return cfg.save()
}

func renew(ctx context.Context, s *signIn) error {
	if s.RefreshToken == "" {
		return fmt.Errorf("the issuer gave no refresh token: %w", login.ErrSignIn)
	}
	i, err := login.Discover(ctx, s.config())
	if err != nil {
		return err
	}
	t, err := i.Refresh(ctx, s.RefreshToken)
	if err == nil {
		s.take(t)
	}
	return err
}

// ended says what there is to do when a sign-in cannot be renewed.
func ended(c *clusterContext, err error) string {
	text := fmt.Sprintf("your sign-in ended at %s and was not renewed: %v", c.SignIn.Expires.Local().Format(time.DateTime), err)
	if errors.Is(err, login.ErrSignIn) {
		text += ": bhctl login"
	}
	if c.Certificate != "" || c.Token != "" {
		text += "\n  bhctl logout goes back to the other credentials of this context."
	}
	return text
}

// lockContexts keeps other processes of bhctl from writing the file; the returned function ends that. So does the end of the process.
func lockContexts() (unlock func(), err error) {
	path, err := contextsPath()
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, err
	}
	f, err := os.OpenFile(path+".lock", os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for err = unix.EINTR; errors.Is(err, unix.EINTR); {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w (and %v)", f.Name(), err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

// loginFlags are those of bhctl login.
type loginFlags struct {
	issuer, clientID, issuerCA, ca, as string
	scopes                             []string
	browser, device                    bool
	port                               int
}

func (a *app) loginCmd() *cobra.Command {
	var f loginFlags
	c := &cobra.Command{Use: "login", Short: "Sign in at the cluster's issuer (OpenID Connect)", Args: cobra.NoArgs,
		Long: "Sign in at the cluster's issuer, in a browser or, with --device or where there is no screen, on another device. The node says which issuer that is.\n" +
			"What you may do then stands in the node's configuration (kind Access). The sign-in is kept in your file of contexts, readable by you alone, renewed\n" +
			"by itself while the issuer lets it be, and used instead of the context's certificate until bhctl logout.",
		Example: "  bhctl login\n  bhctl login --endpoint 192.0.2.10 --ca cluster-ca.pem --as prod    # without a context; an administrator's bhctl config ca prints the authority",
		RunE:    func(cmd *cobra.Command, _ []string) error { return a.login(cmd.Context(), f) }}
	s := c.Flags()
	s.StringVar(&f.issuer, "issuer", "", "URL of the issuer (default: what the node says)")
	s.StringVar(&f.clientID, "client-id", "", "what the cluster is called there (default: what the node says)")
	s.StringVar(&f.issuerCA, "issuer-ca", "", "file with the authority (PEM) of the issuer's certificate (default: the system's authorities)")
	s.StringSliceVar(&f.scopes, "scope", nil, "what to ask for besides openid (default: email, profile, groups, offline_access, as far as the issuer has them)")
	s.BoolVar(&f.browser, "browser", false, "sign in with a browser on this machine")
	s.BoolVar(&f.device, "device", false, "sign in with another device")
	s.IntVar(&f.port, "port", 0, "port on 127.0.0.1 that the browser comes back to, for issuers that want to know it")
	s.StringVar(&f.ca, "ca", "", "file with the cluster's authority (PEM), for a new context")
	s.StringVar(&f.as, "as", "", "name of the context to put it into; a new one needs --endpoint and --ca (default: the current one)")
	c.MarkFlagsMutuallyExclusive("browser", "device")
	c.MarkFlagsRequiredTogether("issuer", "client-id")
	return c
}

func (a *app) login(ctx context.Context, f loginFlags) error {
	name, c, err := a.loginContext(f)
	if err != nil {
		return err
	}
	s := &signIn{Issuer: f.issuer, ClientID: f.clientID, Scopes: f.scopes}
	if f.issuerCA != "" {
		pem, err := os.ReadFile(f.issuerCA)
		if err != nil {
			return fmt.Errorf("--issuer-ca: %w", err)
		}
		s.CA = string(pem)
	} else if c.SignIn != nil { // as the last time
		s.CA = c.SignIn.CA
	}
	if s.Issuer == "" {
		if s.Issuer, s.ClientID, err = a.issuerOf(ctx, c); err != nil {
			return err
		}
	}
	i, err := login.Discover(ctx, s.config())
	if err != nil {
		return err
	}
	t, err := a.signIn(ctx, i, f)
	if err != nil {
		return err
	}
	s.take(t)
	c.SignIn = s
	who, err := a.whoIs(ctx, c)
	if err != nil {
		return fmt.Errorf("you signed in, but the node does not take it, and nothing was kept: %w", err)
	}
	if err := keepContext(name, c); err != nil {
		return err
	}
	fmt.Fprintf(a.out, "signed in as %s, roles: %s; context %q\n", who.GetName(), cmp.Or(strings.Join(who.GetRoles(), ", "), "none"), name)
	if len(who.GetRoles()) == 0 {
		fmt.Fprintf(a.err, "bhctl: no role is bound to you; an administrator can bind one to %q or to one of your groups (kind Access): %s\n", who.GetName(), cmp.Or(strings.Join(who.GetGroups(), ", "), "none"))
	}
	return nil
}

// loginContext is a copy of the context to sign in to, and its name.
func (a *app) loginContext(f loginFlags) (string, *clusterContext, error) {
	cfg, err := loadContexts()
	if err != nil {
		return "", nil, err
	}
	name := cmp.Or(f.as, a.contextName, cfg.Current, "default")
	c := &clusterContext{}
	if old := cfg.Contexts[name]; old != nil {
		*c = *old
	} else if a.endpoint == "" || f.ca == "" {
		return "", nil, fmt.Errorf("there is no context %q yet: give --endpoint HOST and --ca FILE, the cluster's authority (an administrator's bhctl config ca prints it)", name)
	}
	if a.endpoint != "" {
		c.Endpoint, c.Endpoints = a.endpoint, nil
	}
	if f.ca != "" {
		pem, err := os.ReadFile(f.ca)
		if err != nil {
			return "", nil, fmt.Errorf("--ca: %w", err)
		}
		c.CA = string(pem)
	}
	return name, c, nil
}

// keepContext writes one context, and makes it the current one.
func keepContext(name string, c *clusterContext) error {
	unlock, err := lockContexts()
	if err != nil {
		return err
	}
	defer unlock()
	cfg, err := loadContexts()
	if err != nil {
		return err
	}
	cfg.Contexts[name], cfg.Current = c, name
	return cfg.save()
}

// issuerOf asks the node, which tells it to everybody.
func (a *app) issuerOf(ctx context.Context, c *clusterContext) (issuer, clientID string, err error) {
	conn, err := client.DialAny(c.all(), client.Credentials{CA: []byte(c.CA)})
	if err != nil {
		return "", "", err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(a.timeout, defaultTimeout))
	defer cancel()
	r, err := accessv1.NewAccessClient(conn).GetIssuer(ctx, &accessv1.GetIssuerRequest{})
	if status.Code(err) == codes.Unimplemented {
		return "", "", errors.New("the node's version has no sign-in; upgrade it, or use a certificate")
	}
	return r.GetIssuer(), r.GetClientId(), err
}

func (a *app) whoIs(ctx context.Context, c *clusterContext) (*accessv1.WhoAmIResponse, error) {
	conn, err := client.DialAny(c.all(), c.credentials())
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, cmp.Or(a.timeout, defaultTimeout))
	defer cancel()
	return accessv1.NewAccessClient(conn).WhoAmI(ctx, &accessv1.WhoAmIRequest{})
}

// signIn lets the person sign in. It has no limit but theirs, and the issuer's.
func (a *app) signIn(ctx context.Context, i *login.Issuer, f loginFlags) (login.Tokens, error) {
	if f.device || !f.browser && i.HasDevice() && !(hasScreen() && i.HasBrowser()) {
		return i.Device(ctx, func(address, code, complete string) {
			fmt.Fprintf(a.err, "Open %s on any device and type the code  %s\n", address, code)
			if complete != "" {
				fmt.Fprintf(a.err, "or open %s\n", complete)
			}
		})
	}
	return i.Browser(ctx, f.port, func(address string) error {
		fmt.Fprintf(a.err, "Sign in with your browser; if it does not open, go to\n%s\n", address)
		if err := openBrowser(ctx, address); err != nil {
			fmt.Fprintln(a.err, "bhctl: no browser was opened:", err)
		}
		return nil
	})
}

// hasScreen reports whether a browser that is opened here would be seen.
func hasScreen() bool {
	if os.Getenv("BROWSER") != "" || runtime.GOOS == "darwin" {
		return true
	}
	return os.Getenv("SSH_CONNECTION") == "" && (os.Getenv("DISPLAY") != "" || os.Getenv("WAYLAND_DISPLAY") != "")
}

func openBrowser(ctx context.Context, address string) error {
	name := cmp.Or(os.Getenv("BROWSER"), map[string]string{"darwin": "open"}[runtime.GOOS], "xdg-open")
	out, err := exec.CommandContext(ctx, name, address).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s: %w: %.200s", name, err, out)
	}
	return nil
}

func (a *app) logoutCmd() *cobra.Command {
	return &cobra.Command{Use: "logout", Short: "Forget the sign-in of the context; its other credentials stay", Args: cobra.NoArgs, RunE: func(*cobra.Command, []string) error {
		unlock, err := lockContexts()
		if err != nil {
			return err
		}
		defer unlock()
		cfg, err := loadContexts()
		if err != nil {
			return err
		}
		if _, err := cfg.pick(a.contextName); err != nil {
			return err
		}
		name := cmp.Or(a.contextName, cfg.Current)
		c := cfg.Contexts[name]
		if c.SignIn == nil {
			return fmt.Errorf("nobody is signed in in context %q", name)
		}
		ends := c.SignIn.Expires.Local().Format(time.DateTime)
		c.SignIn = nil
		if err := cfg.save(); err != nil {
			return err
		}
		left := "it has no other credentials"
		if c.Certificate != "" {
			left = "its certificate is used again"
		} else if c.Token != "" {
			left = "its token is used again"
		}
		_, err = fmt.Fprintf(a.out, "signed out of context %q; %s. Nodes take the ID token until %s if somebody has it; the issuer's own session goes on\n", name, left, ends)
		return err
	}}
}

func (a *app) whoamiCmd() *cobra.Command {
	return &cobra.Command{Use: "whoami", Short: "Show who you are to the node, and what you may do", Args: cobra.NoArgs, RunE: func(cmd *cobra.Command, _ []string) error {
		return a.call(cmd.Context(), func(ctx context.Context, conn *grpc.ClientConn) error {
			r, err := accessv1.NewAccessClient(conn).WhoAmI(ctx, &accessv1.WhoAmIRequest{})
			if err != nil {
				return err
			}
			return a.print(r, func() *table {
				t := newTable("NAME", "BY", "ROLES", "GROUPS", "EXPIRES", "ID")
				t.add(r.GetName(), r.GetHow(), cmp.Or(strings.Join(r.GetRoles(), ", "), "none"), strings.Join(r.GetGroups(), ", "), r.GetExpires().AsTime().Local().Format(time.DateTime), r.GetId())
				return t
			})
		})
	}}
}

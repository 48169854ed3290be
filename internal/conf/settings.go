// SPDX-License-Identifier: LGPL-2.1-or-later

package conf

import (
	"errors"
	"fmt"
	"io/fs"
)

// Settings is what virtlockd.conf can set, with the defaults where it is silent.
type Settings struct {
	LogLevel        uint32 // log_level: 1 (debug) to 4 (error), 0 if unset
	LogFilters      string // log_filters: "" if unset
	LogOutputs      string // log_outputs: "" if unset
	MaxClients      uint32 // max_clients: clients of the lock socket served at a time, at least 1
	AdminMaxClients uint32 // admin_max_clients: the same for the admin socket
	LockLostAction  string // lock_lost_action: "log", "pause" or "kill"

	file *File // where the values come from; nil for the defaults
}

// Defaults returns the settings of an empty file.
func Defaults() Settings {
	return Settings{MaxClients: 1024, AdminMaxClients: 5000, LockLostAction: "log"}
}

// Where says where the key was set, as "FILE:LINE", or "" where the default is in force.
func (s Settings) Where(key string) string {
	if s.file == nil {
		return ""
	}
	e, ok := s.file.lookup(key)
	if !ok {
		return ""
	}
	return fmt.Sprintf("%s:%d", s.file.name, e.Line)
}

// Unknown returns the definitions of keys that virtlockd doesn't know, in the order of the file: a key is ignored, but
// the operator should hear of it, because most of them are misspelt.
func (s Settings) Unknown() []Entry {
	if s.file == nil {
		return nil
	}
	var unknown []Entry
	for _, e := range s.file.Entries {
		if !known[e.Name] {
			unknown = append(unknown, e)
		}
	}
	return unknown
}

// known holds every key that Settings reads.
var known = map[string]bool{
	"log_level":         true,
	"log_filters":       true,
	"log_outputs":       true,
	"max_clients":       true,
	"admin_max_clients": true,
	"lock_lost_action":  true,
}

// LoadSettings reads the file at path. With optional set, a file that doesn't exist gives the defaults (the default
// file need not exist, one named by -f must).
func LoadSettings(path string, optional bool) (Settings, error) {
	f, err := Load(path)
	if optional && errors.Is(err, fs.ErrNotExist) {
		return Defaults(), nil
	}
	if err != nil {
		return Settings{}, err
	}
	return f.Settings()
}

// Settings reads the keys of virtlockd out of the file. The error is an *Error about the first bad value.
func (f *File) Settings() (Settings, error) {
	s := Defaults()
	s.file = f
	for _, read := range []func() error{
		func() error { return f.Uint32("log_level", &s.LogLevel) },
		func() error { return f.Text("log_filters", &s.LogFilters) },
		func() error { return f.Text("log_outputs", &s.LogOutputs) },
		func() error { return f.Uint32("max_clients", &s.MaxClients) },
		func() error { return f.Uint32("admin_max_clients", &s.AdminMaxClients) },
		func() error { return f.Text("lock_lost_action", &s.LockLostAction) },
		s.check,
	} {
		if err := read(); err != nil {
			return Settings{}, err
		}
	}
	return s, nil
}

// check refuses values that are of the right type but make no sense. What is inside log_filters and log_outputs is
// package logging's business.
func (s *Settings) check() error {
	if s.LogLevel > 4 {
		return s.invalid("log_level", "Failed to set logging priority, argument '%d' is invalid", s.LogLevel)
	}
	// The C daemon takes 0 and then serves exactly one client, which is neither what it says nor what anybody can want.
	if s.MaxClients == 0 {
		return s.invalid("max_clients", "max_clients must be at least 1: with 0 no virtual machine could get a lock; leave it out for the default of %d",
			Defaults().MaxClients)
	}
	if s.AdminMaxClients == 0 {
		return s.invalid("admin_max_clients", "admin_max_clients must be at least 1: with 0 nobody could ask or set anything; leave it out for the default of %d",
			Defaults().AdminMaxClients)
	}
	switch s.LockLostAction {
	case "log", "pause", "kill":
	default:
		return s.invalid("lock_lost_action", "lock_lost_action must be \"log\", \"pause\" or \"kill\", not %.40q", s.LockLostAction)
	}
	return nil
}

func (s *Settings) invalid(key, format string, args ...any) error {
	e, _ := s.file.lookup(key)
	return s.file.errorAt(e, "invalid argument", format, args...)
}

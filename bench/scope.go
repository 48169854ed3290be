// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"testing"
)

// scope is what test/host and its like take for a test: whatever is started in it is ended with it. A failure ends it.
type scope struct {
	testing.TB // for its private method
	cleanups   []func()
	errs       []error
}

// failure is what a failing scope panics with.
type failure struct{ error }

// inScope runs f and cleans up after it.
func inScope(f func(*scope)) (err error) {
	s := new(scope)
	defer func() {
		if r := recover(); r != nil {
			bad, ok := r.(failure)
			if !ok {
				s.cleanUp()
				panic(r)
			}
			s.errs = append(s.errs, bad.error)
		}
		s.cleanUp()
		err = errors.Join(s.errs...)
	}()
	f(s)
	return nil
}

// part runs f in a scope within s, which ends first.
func (s *scope) part(f func(*scope)) {
	if err := inScope(f); err != nil {
		s.Fatal(err)
	}
}

func (s *scope) cleanUp() {
	for _, f := range slices.Backward(s.cleanups) {
		f()
	}
	s.cleanups = nil
}

// beside runs f on another goroutine. wait returns when f has ended, and fails as f has.
func (s *scope) beside(f func()) (wait func()) {
	ended := make(chan any, 1)
	go func() {
		defer func() { ended <- recover() }()
		f()
	}()
	return func() {
		if failed := <-ended; failed != nil {
			panic(failed)
		}
	}
}

// must ends the scope if there is an error.
func (s *scope) must(err error) {
	if err != nil {
		s.Fatal(err)
	}
}

// The methods of testing.TB that are used.

func (s *scope) Helper()                           {}
func (s *scope) Cleanup(f func())                  { s.cleanups = append(s.cleanups, f) }
func (s *scope) Failed() bool                      { return len(s.errs) > 0 }
func (s *scope) Fatal(args ...any)                 { panic(failure{errors.New(fmt.Sprint(args...))}) }
func (s *scope) Fatalf(format string, args ...any) { panic(failure{fmt.Errorf(format, args...)}) }
func (s *scope) Errorf(format string, args ...any) {
	s.errs = append(s.errs, fmt.Errorf(format, args...))
}
func (s *scope) Logf(format string, args ...any) { fmt.Fprintf(os.Stderr, format+"\n", args...) }
func (s *scope) Skip(args ...any)                { s.Fatal(args...) }

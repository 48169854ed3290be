// SPDX-License-Identifier: LGPL-2.1-or-later

package vectors

import (
	"os"
	"strings"
	"testing"

	"virtlockd/test/host"
)

func TestMain(m *testing.M) { host.Main(m) }

func load(t *testing.T) []Scenario {
	t.Helper()
	scenarios, err := Load("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	if len(scenarios) < 147 {
		t.Fatalf("%d scenarios, there should be 147", len(scenarios))
	}
	return scenarios
}

// The recording is true of the C daemon, which also proves the replay.
func TestVectorsOfC(t *testing.T) {
	t.Parallel()
	binary := host.C(t)
	for _, s := range load(t) {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			Run(t, binary, s, nil)
		})
	}
}

// Ours does the same but for the differences that are wanted.
func TestVectors(t *testing.T) {
	t.Parallel()
	binary := host.Ours(t)
	for _, s := range load(t) {
		t.Run(s.Name, func(t *testing.T) {
			t.Parallel()
			Run(t, binary, s, Differences[s.Name])
		})
	}
}

// Each difference is for a step that exists, and is explained.
func TestDifferences(t *testing.T) {
	t.Parallel()
	b, err := os.ReadFile("../../docs/differences.md")
	if err != nil {
		t.Error(err)
	}
	steps := map[string]int{}
	for _, s := range load(t) {
		steps[s.Name] = len(s.Steps)
	}
	ids := map[string]bool{}
	for _, d := range differences {
		if d.Step >= steps[d.Scenario] {
			t.Errorf("%s: %s has no step %d", d.ID, d.Scenario, d.Step)
		}
		ids[d.ID] = true
	}
	for id := range ids {
		if !strings.Contains(string(b), "| "+id+" |") {
			t.Errorf("%s is not explained in docs/differences.md", id)
		}
	}
}

// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"time"
)

// unit of a row's values.
type unit string

const (
	seconds   unit = "s"
	perSecond unit = "1/s"
	bytesUnit unit = "B"
	count     unit = ""
)

// format a value with three digits.
func (u unit) format(v float64) string {
	var scale float64
	var names []string
	switch u {
	case seconds:
		v, scale, names = v*1e6, 1000, []string{"us", "ms", "s"}
	case bytesUnit:
		scale, names = 1024, []string{"B", "KiB", "MiB"}
	case count:
		scale, names = 1, []string{""}
	default:
		scale, names = 1000, []string{"/s", "k/s", "M/s"}
	}
	for len(names) > 1 && math.Abs(v) >= scale {
		v, names = v/scale, names[1:]
	}
	digits := 0
	if a := math.Abs(v); a < 10 {
		digits = 2
	} else if a < 100 {
		digits = 1
	}
	return strings.TrimSpace(fmt.Sprintf("%.*f %s", digits, v, names[0]))
}

// goal of a row.
type goal struct {
	// AtMostC and AtLeastC are factors of what the C daemon needs, AtMostBase of our own without the load, which Base names. AtMost is a
	// value.
	AtMostC    float64 `json:"at_most_c,omitempty"`
	AtLeastC   float64 `json:"at_least_c,omitempty"`
	AtMostBase float64 `json:"at_most_base,omitempty"`
	Base       string  `json:"base,omitempty"`
	AtMost     float64 `json:"at_most,omitempty"`
}

func atMostC(f float64) goal                 { return goal{AtMostC: f} }
func atLeastC(f float64) goal                { return goal{AtLeastC: f} }
func atMostBase(f float64, base string) goal { return goal{AtMostBase: f, Base: base} }
func atMost(v float64) goal                  { return goal{AtMost: v} }

// both goals have to be reached.
func both(a, b goal) goal {
	return goal{
		AtMostC: max(a.AtMostC, b.AtMostC), AtLeastC: max(a.AtLeastC, b.AtLeastC),
		AtMostBase: max(a.AtMostBase, b.AtMostBase), Base: cmp.Or(a.Base, b.Base), AtMost: max(a.AtMost, b.AtMost),
	}
}

// row is one line of the table. The values are one for each round.
type row struct {
	Section string             `json:"section"`
	Name    string             `json:"name"`
	Unit    unit               `json:"unit"`
	Values  map[kind][]float64 `json:"values"`
	Base    []float64          `json:"base,omitempty"` // ours without the load, in turns
	Goal    goal               `json:"goal"`
	Note    string             `json:"note,omitempty"`
	Curve   string             `json:"curve,omitempty"` // what the load is
	Load    int                `json:"load,omitempty"`
}

func (r *row) add(k kind, v float64) { r.Values[k] = append(r.Values[k], v) }

// median of values, NaN if there are none.
func median(values []float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	v := slices.Sorted(slices.Values(values))
	n := len(v)
	return (v[(n-1)/2] + v[n/2]) / 2
}

// ratio of two series that were measured in turns: the median of the rounds' ratios.
func ratio(a, b []float64) float64 {
	if len(a) != len(b) {
		return median(a) / median(b)
	}
	ratios := make([]float64, len(a))
	for i := range a {
		ratios[i] = a[i] / b[i]
	}
	return median(ratios)
}

// enough rounds to judge a value by their median. A ratio, which does not drift, needs fewer.
const enough = 5

// verdict tells what the goal is, and whether it is reached. Without the C daemon goals against it are not judged.
func (r *row) verdict() (text, result string) {
	var texts []string
	result = ""
	judge := func(text string, known, ok bool) {
		texts = append(texts, text)
		switch {
		case known && !ok:
			result = "MISS"
		case known && result == "":
			result = "pass"
		}
	}
	g, against := r.Goal, ratio(r.Values[ours], r.Values[cOne])
	known := !math.IsNaN(against)
	if g.AtMost > 0 {
		judge("<= "+r.Unit.format(g.AtMost), len(r.Values[ours]) >= enough, median(r.Values[ours]) <= g.AtMost)
	}
	if g.AtMostC > 0 {
		judge(fmt.Sprintf("<= %.2g x C", g.AtMostC), known, against <= g.AtMostC)
	}
	if g.AtLeastC > 0 {
		judge(fmt.Sprintf(">= %.3g x C", g.AtLeastC), known, against >= g.AtLeastC)
	}
	if g.AtMostBase > 0 {
		f := ratio(r.Values[ours], r.Base)
		judge(fmt.Sprintf("<= %.2g x own %s (%.2f)", g.AtMostBase, g.Base, f), !math.IsNaN(f), f <= g.AtMostBase)
	}
	return strings.Join(texts, ", "), result
}

// results of a run.
type results struct {
	Date    time.Time `json:"date"`
	Form    string    `json:"form"`
	Machine string    `json:"machine"`
	Disk    string    `json:"disk"`
	Load    string    `json:"load"` // of the machine before the run, processes
	Ours    string    `json:"ours"`
	C       string    `json:"c"`
	Seconds float64   `json:"seconds"`
	Rows    []*row    `json:"rows"`

	at string // section
}

// section begins a part of the table.
func (r *results) section(name string) { r.at = name }

func (r *results) row(name string, u unit, g goal) *row {
	x := &row{Section: r.at, Name: name, Unit: u, Goal: g, Values: map[kind][]float64{}}
	r.Rows = append(r.Rows, x)
	return x
}

// print writes the table in Markdown.
func (r *results) print(w io.Writer) {
	fmt.Fprintf(w, "%s, %s form, %.0f s; %s; load before it %s\n", r.Date.Format("2006-01-02 15:04"), r.Form, r.Seconds, r.Machine, r.Load)
	fmt.Fprintf(w, "ours: %s\nC: %s\n", r.Ours, r.C)
	cell := func(x *row, k kind) string {
		if len(x.Values[k]) == 0 {
			return "-"
		}
		return x.Unit.format(median(x.Values[k]))
	}
	times := func(x *row, k kind) string {
		f := ratio(x.Values[ours], x.Values[k])
		if math.IsNaN(f) {
			return "-"
		}
		return fmt.Sprintf("%.3g", f)
	}
	lines := [][]string{}
	at := ""
	passed, missed := 0, 0
	for _, x := range r.Rows {
		if len(x.Values) == 0 {
			continue
		}
		if x.Section != at {
			at = x.Section
			lines = append(lines, nil, []string{at, "C", "floor", "ours", "ours / C", "ours / floor", "goal", ""}, nil)
		}
		text, result := x.verdict()
		switch result {
		case "pass":
			passed++
		case "MISS":
			missed++
		}
		name := x.Name
		if x.Note != "" {
			name += " (" + x.Note + ")"
		}
		lines = append(lines, []string{name, cell(x, cOne), cell(x, bare), cell(x, ours), times(x, cOne), times(x, bare), text, result})
	}
	var width [8]int
	for _, l := range lines {
		for i, c := range l {
			width[i] = max(width[i], len(c), 3)
		}
	}
	for i, l := range lines {
		switch {
		case l != nil:
			for j, c := range l {
				fmt.Fprintf(w, "| %-*s ", width[j], c)
			}
			fmt.Fprintln(w, "|")
		case i+1 < len(lines) && lines[i+1] != nil && lines[i+1][1] == "C":
			fmt.Fprintln(w)
		default:
			for _, n := range width {
				fmt.Fprintf(w, "|%s", strings.Repeat("-", n+2))
			}
			fmt.Fprintln(w, "|")
		}
	}
	fmt.Fprintf(w, "\n%d goals reached, %d missed\n", passed, missed)
}

func (r *results) writeJSON(path string) error {
	b, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}

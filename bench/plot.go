// SPDX-License-Identifier: LGPL-2.1-or-later

package main

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
)

// line of a panel: a cost in s against a load, which is drawn from 1 on.
type line struct {
	kind   kind
	dashed bool // connect + REGISTER
	points [][2]float64
}

// panel is one picture, logarithmic both ways.
type panel struct {
	title string
	lines []line
}

var colours = map[kind]string{ours: "#1a7f37", cOne: "#c0392b", bare: "#888888"}

const (
	panelWidth, panelHeight = 420, 320
	left, top               = 60, 34
	plotWidth, plotHeight   = panelWidth - left - 20, panelHeight - top - 56
)

// panels finds the curves among the rows.
func (r *results) panels() []panel {
	var out []panel
	for _, x := range r.Rows {
		if x.Curve == "" || len(x.Values) == 0 {
			continue
		}
		i := slices.IndexFunc(out, func(p panel) bool { return p.title == x.Curve })
		if i < 0 {
			i = len(out)
			out = append(out, panel{title: x.Curve})
		}
		p := &out[i]
		for _, k := range []kind{cOne, bare, ours} {
			if len(x.Values[k]) == 0 {
				continue
			}
			dashed := strings.HasPrefix(x.Name, "connect")
			j := slices.IndexFunc(p.lines, func(l line) bool { return l.kind == k && l.dashed == dashed })
			if j < 0 {
				j = len(p.lines)
				p.lines = append(p.lines, line{kind: k, dashed: dashed})
			}
			p.lines[j].points = append(p.lines[j].points, [2]float64{float64(max(1, x.Load)), median(x.Values[k])})
		}
	}
	return out
}

func (r *results) writeSVG(path string) error {
	panels := r.panels()
	var s strings.Builder
	fmt.Fprintf(&s, `<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 %d %d" font-family="sans-serif" font-size="12">`+"\n", max(1, len(panels))*panelWidth, panelHeight)
	fmt.Fprintf(&s, `<rect width="100%%" height="100%%" fill="white"/>`+"\n")
	for i, p := range panels {
		fmt.Fprintf(&s, `<g transform="translate(%d 0)">`+"\n", i*panelWidth)
		p.draw(&s)
		fmt.Fprintln(&s, `</g>`)
	}
	fmt.Fprintln(&s, `</svg>`)
	return os.WriteFile(path, []byte(s.String()), 0o644)
}

func (p *panel) draw(s *strings.Builder) {
	low, high, most := math.Inf(1), math.Inf(-1), 1.0
	for _, l := range p.lines {
		for _, pt := range l.points {
			low, high, most = min(low, pt[1]), max(high, pt[1]), max(most, pt[0])
		}
	}
	from, to := math.Floor(math.Log10(low)), math.Ceil(math.Log10(high))
	to = max(to, from+1)
	decades := max(1, math.Log10(most))
	x := func(load float64) float64 { return left + plotWidth*math.Log10(load)/decades }
	y := func(cost float64) float64 { return top + plotHeight*(to-math.Log10(cost))/(to-from) }

	fmt.Fprintf(s, `<text x="%d" y="18" font-size="14">time of a request beside %s</text>`+"\n", left, p.title)
	for d := from; d <= to; d++ {
		cost := math.Pow(10, d)
		fmt.Fprintf(s, `<line x1="%d" y1="%.1f" x2="%d" y2="%.1f" stroke="#ddd"/>`, left, y(cost), left+plotWidth, y(cost))
		fmt.Fprintf(s, `<text x="%d" y="%.1f" text-anchor="end">%s</text>`+"\n", left-6, y(cost)+4, decade(cost))
	}
	for d := 0.0; d <= decades; d++ {
		load := math.Pow(10, d)
		label := fmt.Sprintf("%.0f", load)
		if d == 0 {
			label = "0" // a logarithm has none
		}
		fmt.Fprintf(s, `<line x1="%.1f" y1="%d" x2="%.1f" y2="%d" stroke="#ddd"/>`, x(load), top, x(load), top+plotHeight)
		fmt.Fprintf(s, `<text x="%.1f" y="%d" text-anchor="middle">%s</text>`+"\n", x(load), top+plotHeight+16, label)
	}
	for _, l := range p.lines {
		dash := ""
		if l.dashed {
			dash = ` stroke-dasharray="5 4"`
		}
		var points []string
		for _, pt := range l.points {
			points = append(points, fmt.Sprintf("%.1f,%.1f", x(pt[0]), y(pt[1])))
		}
		fmt.Fprintf(s, `<polyline points="%s" fill="none" stroke="%s" stroke-width="2"%s/>`+"\n", strings.Join(points, " "), colours[l.kind], dash)
	}
	at := left
	for _, k := range []kind{cOne, ours, bare} {
		fmt.Fprintf(s, `<rect x="%d" y="%d" width="12" height="3" fill="%s"/><text x="%d" y="%d">%s</text>`+"\n",
			at, top+plotHeight+34, colours[k], at+16, top+plotHeight+40, k)
		at += 60
	}
	fmt.Fprintf(s, `<text x="%d" y="%d">dashed: connect + REGISTER</text>`+"\n", at, top+plotHeight+40)
}

// decade names a power of ten of seconds.
func decade(v float64) string {
	switch {
	case v < 0.99e-3:
		return fmt.Sprintf("%.0f us", v*1e6)
	case v < 0.99:
		return fmt.Sprintf("%.0f ms", v*1e3)
	default:
		return fmt.Sprintf("%.0f s", v)
	}
}

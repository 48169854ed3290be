// SPDX-License-Identifier: LGPL-2.1-or-later

package logging

import (
	"log/slog"
	"math"
)

// Level is a priority as libvirt counts them.
type Level uint8

// The levels, with the numbers of log_level.
const (
	Debug   Level = 1
	Info    Level = 2
	Warning Level = 3
	Error   Level = 4
)

var levelNames = [...]string{Debug: "debug", Info: "info", Warning: "warning", Error: "error"}

// String returns the name that stands in a line.
func (l Level) String() string { return levelNames[l] }

// syslog returns the priority of syslog(3).
func (l Level) syslog() int { return [...]int{Debug: 7, Info: 6, Warning: 4, Error: 3}[l] }

// levelOf maps slog's levels, also those between its named ones, which count as the next lower.
func levelOf(l slog.Level) Level {
	switch {
	case l >= slog.LevelError:
		return Error
	case l >= slog.LevelWarn:
		return Warning
	case l >= slog.LevelInfo:
		return Info
	}
	return Debug
}

// threshold returns the lowest of slog's levels that count as l.
func (l Level) threshold() slog.Level {
	if l == Debug {
		return math.MinInt
	}
	return slog.Level(4 * (int(l) - int(Info)))
}

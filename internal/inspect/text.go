// SPDX-License-Identifier: LGPL-2.1-or-later

package inspect

import (
	"encoding/json"
	"fmt"
	"unicode/utf8"
)

// Text is what a client or a file system has named: any bytes. In JSON it is a string if it is UTF-8, and else
// an object with its bytes: {"base64": "..."}.
type Text string

// MarshalJSON implements json.Marshaler.
func (t Text) MarshalJSON() ([]byte, error) {
	if utf8.ValidString(string(t)) {
		return json.Marshal(string(t))
	}
	return json.Marshal(raw{[]byte(t)})
}

// UnmarshalJSON implements json.Unmarshaler.
func (t *Text) UnmarshalJSON(b []byte) error {
	var s string
	if err := json.Unmarshal(b, &s); err == nil {
		*t = Text(s)
		return nil
	}
	var r raw
	if err := json.Unmarshal(b, &r); err != nil {
		return fmt.Errorf("neither a string nor an object with base64: %w", err)
	}
	*t = Text(r.Base64)
	return nil
}

type raw struct {
	Base64 []byte `json:"base64"`
}

// SPDX-License-Identifier: LGPL-2.1-or-later

package systemd

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
)

// install lets "make install" put what was built, the units and the configuration below dir.
func install(daemon, tool, dir string) error {
	top, err := sourceTree()
	if err != nil {
		return err
	}
	// -o build: the programs are there already.
	cmd := exec.Command("make", "--no-print-directory", "-C", top, "-o", "build", "install", "BIN="+daemon, "CTL="+tool, "DESTDIR="+dir)
	// Variables of a make that runs the test are not meant for this one.
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME")}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("make install: %w\n%s", err, out)
	}
	return nil
}

// sourceTree finds the directory of the Makefile: tests run in their package's directory.
func sourceTree() (string, error) {
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		if _, err := os.Stat(filepath.Join(dir, "go.mod")); err == nil {
			return dir, nil
		}
		if dir == filepath.Dir(dir) {
			return "", errors.New("the source tree is not there: no go.mod above the working directory")
		}
		dir = filepath.Dir(dir)
	}
}

# SPDX-License-Identifier: Apache-2.0 OR BSD-3-Clause
"""apt with sources, lists and preferences of its own, so that the machine's stay as they are.

Knows apt, and that a suite of another release is found where this machine has its own from. Does not
know what is installed, nor why. Standard library only.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path

KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


def say(text: str) -> None:
    print(f"peers: {text}", flush=True)


def run(*command: str | Path, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    """Run a command; its output is shown only when it fails, all of it."""
    words = [str(word) for word in command]
    done = subprocess.run(
        words, cwd=cwd, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    if done.returncode:
        raise SystemExit(f"peers: {' '.join(words)}: exit {done.returncode}\n{done.stdout}")
    return done.stdout


def codename() -> str:
    release = dict(
        line.strip().split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line
    )
    return release.get("VERSION_CODENAME", "").strip('"')


class Apt:
    """``suites`` are read besides the machine's own, with packages of theirs at priority 50."""

    def __init__(self, root: Path, suites: Iterable[str]) -> None:
        self.root = root
        self.sources, preferences = self.root / "sources.list.d", self.root / "preferences.d"
        for folder in (
            self.sources,
            preferences,
            self.root / "lists/partial",
            self.root / "archives/partial",
        ):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        etc = Path("/etc/apt")
        for file in (etc / "sources.list", *etc.glob("sources.list.d/*")):
            if file.suffix in (".list", ".sources") and file.exists():
                (self.sources / file.name).symlink_to(file)
        for file in (etc / "preferences", *etc.glob("preferences.d/*")):
            if file.suffix in ("", ".pref") and file.exists():
                (preferences / file.name).symlink_to(file)
        config = self.root / "apt.conf"
        config.write_text(
            'Dir::Etc::SourceList "/dev/null";\n'
            f'Dir::Etc::SourceParts "{self.sources}";\n'
            'Dir::Etc::Preferences "/dev/null";\n'
            f'Dir::Etc::PreferencesParts "{preferences}";\n'
            f'Dir::State::Lists "{self.root}/lists";\n'
            f'Dir::Cache "{self.root}";\n'
            f'Dir::Cache::Archives "{self.root}/archives";\n'
            # The sandbox user may not enter a home directory; every index and package is still verified.
            'APT::Sandbox::User "root";\n'
            'Acquire::Retries "3";\n'
        )
        self.env = {**os.environ, "APT_CONFIG": str(config), "LC_ALL": "C"}
        self.env["DEBIAN_FRONTEND"] = "noninteractive"
        say("apt-get update (lists of our own)")
        self("update")
        release = codename()
        extra = [suite for suite in suites if suite not in ("", release)]
        if extra:
            self._add_suites(release, extra, preferences)

    def _add_suites(self, release: str, suites: Sequence[str], preferences: Path) -> None:
        """Take more suites from wherever this machine has its own release from."""
        targets = self("indextargets", "--format", "$(CODENAME) $(REPO_URI)", "Created-By: Packages")
        addresses = [line.split(" ", 1)[1] for line in targets.splitlines() if line.startswith(f"{release} ")]
        if not addresses:
            raise SystemExit(f"peers: apt has no source for {release}:\n{targets}")
        (self.sources / "pyvhost-extra.sources").write_text(
            "\n".join(
                f"Types: deb deb-src\nURIs: {addresses[0]}\nSuites: {suite}\nComponents: main\n"
                f"Signed-By: {KEYS}\n"
                for suite in suites
            )
        )
        (preferences / "pyvhost").write_text(
            "\n".join(f"Package: *\nPin: release n={suite}\nPin-Priority: 50\n" for suite in suites)
        )
        self("update")

    def __call__(self, *arguments: str, cwd: Path | None = None) -> str:
        return run("apt-get", "-q", *arguments, cwd=cwd, env=self.env)

    def fetch(self, packages: Sequence[str], suite: str) -> list[Path]:
        """Download packages; they stay until the next call."""
        downloads = self.root / "downloads"
        shutil.rmtree(downloads, ignore_errors=True)
        downloads.mkdir()
        self("download", *(f"{package}/{suite}" if suite else package for package in packages), cwd=downloads)
        return sorted(downloads.glob("*.deb"))

    def unpack(self, packages: Sequence[str], suite: str, into: Path) -> None:
        """Download packages and unpack them somewhere without installing them."""
        for package in self.fetch(packages, suite):
            run("dpkg", "-x", package, into)
            package.unlink()

    def source(self, package: str, suite: str, into: Path, wanted: tuple[str, ...] = ("",)) -> None:
        """What upstream released of a source package, without its outermost folder; only what has a name that
        starts with one of ``wanted``."""
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        self("source", "--download-only", "--tar-only", f"{package}/{suite}", cwd=into)
        (tarball,) = into.glob("*.orig.tar.*")
        with tarfile.open(tarball) as archive:
            # Debian 12's Python does not know filters yet, and ignores the attribute.
            archive.extraction_filter = getattr(tarfile, "data_filter", None)
            for member in archive:
                _, _, member.name = member.name.partition("/")
                if member.name and member.name.startswith(wanted):
                    archive.extract(member, into)

    def depends(self, package: str, suite: str, pattern: str) -> list[str]:
        """Of what a package depends on, the names that a regular expression matches whole."""
        name = f"{package}/{suite}" if suite else package
        record = run("apt-cache", "show", "--no-all-versions", name, env=self.env)
        match = re.search(r"^Depends: (.*)$", record, re.MULTILINE)
        names = (
            [re.split(r"[ :(|]", part.strip(), maxsplit=1)[0] for part in match[1].split(",")]
            if match
            else []
        )
        return [name for name in names if re.fullmatch(pattern, name)]

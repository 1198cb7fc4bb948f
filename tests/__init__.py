"""Tests, mirroring the sources. A package, because a dependency installs one of the same name."""

#!/bin/sh
# What the tests of the clinician page drive: Debian's Chromium and its driver, where they are missing.
set -eu
command -v chromium >/dev/null && command -v chromedriver >/dev/null && exit 0
command -v apt-get >/dev/null || { echo "install chromium and chromedriver by your system's own means, then run this again" >&2; exit 1; }
[ "$(id -u)" = 0 ] && AS= || AS=sudo
$AS apt-get update -qq
$AS env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends chromium chromium-driver

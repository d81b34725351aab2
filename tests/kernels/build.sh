#!/bin/sh
# Builds kernel_table, the test of the CPU kernels, without torch.
#   sh tests/kernels/build.sh CXX TARGET OUT
# CXX: a compiler, e.g. "c++" or "python -m ziglang c++"; TARGET: native, or a triple such as
# aarch64-linux-musl (linked statically, so that an emulator needs no system libraries); OUT: the
# program, with its object files in OUT.objects. CXXFLAGS is added, JOBS files compile at a time.
# Only what is older than its source or any header is compiled again. Object files of csrc/cpu that
# are in the folder KERNELS and as new are linked from there: the extension's own, with its flags.
set -eu

if [ $# -ne 3 ]; then
    sed -n '2,8s/^# //p' "$0" >&2
    exit 2
fi
cxx=$1 target=$2 out=$3
here=$(cd "$(dirname "$0")" && pwd)
cpu=$here/../../csrc/cpu
objects=$out.objects

case $target in
native) machine=$(uname -m) target_flags= ;;
*) machine=${target%%-*} target_flags="-target $target -static" ;;
esac
case $machine in
x86_64 | amd64) families="avx2 avx512" single=amx ;;
aarch64 | arm64) families=neon single= ;;
*) families= single= ;;
esac

flags="-std=c++20 -O2 -ffp-contract=off -Wall -Wno-psabi -pthread $target_flags ${CXXFLAGS:-}"
sources="codec ref threads cpu_features amx_emulated $single"
for family in $families; do
    for file in "$cpu/$family"*.cpp; do
        [ -e "$file" ] && sources="$sources $(basename "$file" .cpp)"
    done
done

mkdir -p "$objects"
objects=$(cd "$objects" && pwd)
# Other flags, another build.
if [ "$(cat "$objects/flags" 2>/dev/null)" != "$cxx $flags" ]; then
    rm -f "$objects"/*.o
    echo "$cxx $flags" >"$objects/flags"
fi

# fresh OBJECT FILE FOLDER: the object is newer than the file, the headers there and those of csrc.
fresh() {
    [ -e "$1" ] && [ -z "$(find "$2" "$3"/*.h "$cpu"/*.h "$cpu"/../*.h -newer "$1" | head -n 1)" ]
}

compile= link=
for file in "$here"/*.cpp $(printf "$cpu/%s.cpp " $sources); do
    name=$(basename "$file" .cpp) folder=$(dirname "$file")
    if [ "$folder" = "$cpu" ] && fresh "${KERNELS:-}/$name.o" "$file" "$folder"; then
        link="$link $KERNELS/$name.o"
        continue
    fi
    link="$link $objects/$name.o"
    fresh "$objects/$name.o" "$file" "$here" || compile="$compile $file"
done
if [ -n "$compile" ]; then
    printf '%s\n' $compile | sed "s|.*/\(.*\)\.cpp|& -o $objects/\1.o|" |
        xargs -P "${JOBS:-2}" -L 1 $cxx $flags -c
fi
$cxx $flags $link -o "$out"

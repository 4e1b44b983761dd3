#!/bin/sh
# Builds the engines of many small networks with trtexec, measures them in turns, and writes the results.
# Requirements: a POSIX shell, coreutils and TensorRT 8.0 or newer (JetPack 4.6 or newer).
#
#   sh run.sh
#   TRTEXEC=/path/to/trtexec sh run.sh --processes 2 --duration 3
#
# Run it again after an interruption: engines and measurements are kept. Environment: TRTEXEC (path of trtexec),
# TRT_VERSION (such as 8.5.2, if it cannot be detected).
set -u
LC_ALL=C
export LC_ALL

duration=5 warmup=2 processes=3 out=results workspace='' dla='' check=yes keep=no

# include on_device_common.sh

usage() {
    say 'usage: sh run.sh [--duration SECONDS] [--warmup SECONDS] [--processes N] [--workspace MIB]'
    say '                 [--keep-engines] [--skip-checksums]'
}

while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit 0 ;;
        --skip-checksums) check=no && shift && continue ;;
        --keep-engines) keep=yes && shift && continue ;;
        --duration | --warmup | --processes | --workspace) [ $# -ge 2 ] || die "$1 takes a value" ;;
        *) usage >&2 && die "unknown option $1" ;;
    esac
    number "$1" "$2"
    case $1 in
        --duration) duration=$2 ;;
        --warmup) warmup=$2 ;;
        --processes) processes=$2 ;;
        --workspace) workspace=$2 ;;
    esac
    shift 2
done

case $0 in */*) cd "${0%/*}" || die "cannot enter ${0%/*}" ;; esac
[ -f networks.txt ] && [ -f order.txt ] && [ -f SHA256SUMS ] || die 'this is not a bundle: networks.txt, order.txt or SHA256SUMS is missing'
[ "$processes" -ge 1 ] || die '--processes must be at least 1'
if [ "$check" = yes ]; then
    sha256sum -c --quiet SHA256SUMS || die 'files are missing or damaged: copy the bundle again'
fi
[ -n "$workspace" ] || workspace=$(cat workspace.txt)
mkdir -p "$out" engines || die "cannot write to $out"

look_around

# --- earlier measurements must be from this board -----------------------------------------------------------------

board=$(board_id)
identity="TensorRT $version; power mode ${power_mode:-not known}; ${model_name:-a machine without a model name} $board"
if [ -f "$out/identity.txt" ]; then
    before=$(cat "$out/identity.txt")
    [ "$before" = "$identity" ] || die "the folder $out was started with [$before], but this is [$identity]: continue with the former, or delete the folder $out to measure everything again"
else
    { say "$identity" >"$out/identity.part" && mv "$out/identity.part" "$out/identity.txt"; } || die "cannot write to $out"
fi

# --- one network --------------------------------------------------------------------------------------------------

failed=0
reason=''
total=$(wc -l <order.txt | tr -d ' ')

finished() { # name -> whether its engine is no longer needed
    [ ! -f profile.txt ] || [ -f "$out/$1/profile.json" ] || return 1
    slot=0
    while read -r each; do
        slot=$((slot + 1))
        [ "$each" = "$1" ] || continue
        pass=1
        while [ "$pass" -le "$processes" ]; do
            [ -f "$out/$1/$pass-$slot.txt" ] || return 1
            pass=$((pass + 1))
        done
    done <order.txt
}

describe() { # name precision status
    size=0
    [ -f "engines/$1.engine" ] && size=$(wc -c <"engines/$1.engine" | tr -d ' ')
    {
        printf '{"name": "%s", "precision": "%s", "status": "%s", "reason": "%s", ' "$1" "$2" "$3" "$reason"
        printf '"onnx_sha256": "%s", ' "$(sha256sum "models/$1.onnx" | cut -c 1-64)"
        printf '"engine_bytes": %s, "flags": "%s%s"}\n' "$size" "$(build_flags "$2")" "$(measure_flags)"
    } >"$out/$1/result.part" && mv "$out/$1/result.part" "$out/$1/result.json" || die "cannot write to $out: is the disk full?"
}

measure() { # name pass slot
    times=$out/$1/times.part goal=$out/$1/$2-$3
    before=$(readings)
    # shellcheck disable=SC2046
    if ! "$trtexec" "--loadEngine=engines/$1.engine" "--warmUp=$((warmup * 1000))" "--duration=$duration" \
        "--exportTimes=$times" $(measure_flags) >"$out/$1/measure.log" 2>&1 || [ ! -s "$times" ]; then
        fail_with "$out/$1/measure.log"
        rm -f "$times"
        return 1
    fi
    tail -c 1000000 "$times" >"$times.end" && compute_times "$times.end" >"$goal.part"
    rm -f "$times" "$times.end"
    runs=$(wc -l <"$goal.part" | tr -d ' ')
    [ "$runs" -gt 0 ] || {
        rm -f "$goal.part"
        reason='trtexec wrote no computeMs'
        return 1
    }
    {
        printf '{"tensorrt": "%s", "power_mode": "%s", "board": "%s", ' "$version" "$power_mode" "$board"
        printf '"before": {%s}, "after": {%s}}\n' "$before" "$(readings)"
    } >"$goal.json" || die "cannot write to $out: is the disk full?"
    sort -n "$goal.part" >"$out/$1/sorted.part"
    median=$(milli "$(at_share "$out/$1/sorted.part" "$runs" 50)")
    rm -f "$out/$1/sorted.part"
    mv "$goal.part" "$goal.txt" || die "cannot write to $out: is the disk full?"
}

profile() { # name: times of the layers, in a separate run because profiling slows it
    if "$trtexec" "--loadEngine=engines/$1.engine" --warmUp=200 --duration=2 --dumpProfile --separateProfileRun \
        "--exportProfile=$out/$1/profile.part" >"$out/$1/profile.log" 2>&1 && [ -s "$out/$1/profile.part" ]; then
        mv "$out/$1/profile.part" "$out/$1/profile.json"
    else
        rm -f "$out/$1/profile.part" && say "$1: no profile"
    fi
}

# --- all engines first, then all networks in turns ------------------------------------------------------------------

count=0
while read -r name precision; do
    count=$((count + 1))
    mkdir -p "$out/$name" || die "cannot write to $out"
    if [ -f "$out/$name/result.json" ] && finished "$name"; then
        continue
    fi
    say "engine $count of $(wc -l <networks.txt | tr -d ' ')"
    if build "$name" "$precision" </dev/null; then
        reason='' && describe "$name" "$precision" ok
    else
        say "$name: not built: $reason" && describe "$name" "$precision" build-failed && failed=1
    fi
done <networks.txt

reversed=''
forwards=''
while read -r name; do
    forwards="$forwards $name" reversed="$name $reversed"
done <order.txt

pass=1
while [ "$pass" -le "$processes" ]; do
    # alternate the order, so that a device that slows down does not favour the same networks
    if [ $((pass % 2)) -eq 1 ]; then
        queue=$forwards slot=0 step=1
    else
        queue=$reversed slot=$((total + 1)) step=-1
    fi
    done_now=0
    for name in $queue; do
        slot=$((slot + step)) done_now=$((done_now + 1))
        [ ! -f "$out/$name/$pass-$slot.txt" ] && [ -f "engines/$name.engine" ] || continue
        if measure "$name" "$pass" "$slot" </dev/null; then
            say "turn $pass of $processes, $done_now of $total: $name $median ms"
        else
            say "$name: not measured: $reason" && failed=1
            precision=$(while read -r each kind; do [ "$each" = "$name" ] && say "$kind"; done <networks.txt)
            describe "$name" "$precision" measure-failed
        fi
    done
    pass=$((pass + 1))
done

if [ -f profile.txt ]; then
    say 'profiling'
    while read -r name precision; do
        [ ! -f "$out/$name/profile.json" ] && [ -f "engines/$name.engine" ] && profile "$name" </dev/null
    done <networks.txt
fi

# --- the results ----------------------------------------------------------------------------------------------------

gpu='' capability='' clock=''
while read -r name precision; do
    for log in "$out/$name/measure.log" "$out/$name/build.log"; do
        [ -z "$capability" ] && [ -f "$log" ] || continue
        capability=$(after_words "$log" 'Compute Capability: ')
        gpu=$(after_words "$log" 'Selected Device: ')
        clock=$(after_words "$log" 'Compute Clock Rate: ')
    done
done <networks.txt

{
    printf '{"format": 1, "bundle": "%s", ' "$(sha256sum SHA256SUMS | cut -c 1-64)"
    printf '"tensorrt": "%s", "l4t": "%s", "jetpack": "%s", ' "$version" "$l4t" "$jetpack"
    printf '"model": "%s", "power_mode": "%s", "board": "%s", ' "$model_name" "$power_mode" "$board"
    printf '"gpu": "%s", "compute_capability": "%s", "clock": "%s", ' "$gpu" "$capability" "$clock"
    printf '"duration_s": %s, "warmup_s": %s, "processes": %s, "networks": [' "$duration" "$warmup" "$processes"
    between=''
    while read -r name precision; do
        printf '%s\n' "$between" && cat "$out/$name/result.json"
        between=,
    done <networks.txt
    printf ']}\n'
} >"$out/results.json.part" && mv "$out/results.json.part" "$out/results.json" || die "cannot write $out/results.json: is the disk full?"
rm -f "$out"/*/*.part
if [ "$failed" -eq 0 ] && [ "$keep" = no ]; then
    rm -rf engines
fi
pack_results
exit "$failed"

#!/bin/sh
# Builds the engines of this bundle with trtexec, measures them, verifies their outputs and writes the results.
# Requirements: a POSIX shell, coreutils and TensorRT 8.0 or newer (JetPack 4.6 or newer).
#
#   sh run.sh                          everything
#   sh run.sh --only fp16 --processes 1 --duration 5
#
# Environment: TRTEXEC (path of trtexec), TRT_VERSION (such as 8.5.2, if it cannot be detected),
# VERIFY_FLAGS (more flags of trtexec for verification). Run it again after an interruption: engines are kept.
set -u
LC_ALL=C
export LC_ALL

duration=15 warmup=2 processes=3 only='' out=results workspace='' dla='' check=yes

# include on_device_common.sh

usage() {
    say 'usage: sh run.sh [--only PRECISION] [--duration SECONDS] [--warmup SECONDS] [--processes N]'
    say '                 [--workspace MIB] [--dla CORE] [--out FOLDER] [--skip-checksums]'
}

while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit 0 ;;
        --skip-checksums) check=no && shift && continue ;;
        --only | --duration | --warmup | --processes | --workspace | --dla | --out)
            [ $# -ge 2 ] || die "$1 takes a value" ;;
        *) usage >&2 && die "unknown option $1" ;;
    esac
    case $1 in
        --only) only=$2 ;;
        --duration) number "$1" "$2" && duration=$2 ;;
        --warmup) number "$1" "$2" && warmup=$2 ;;
        --processes) number "$1" "$2" && processes=$2 ;;
        --workspace) number "$1" "$2" && workspace=$2 ;;
        --dla) number "$1" "$2" && dla=$2 ;;
        --out) out=$2 ;;
    esac
    shift 2
done

case $0 in */*) cd "${0%/*}" || die "cannot enter ${0%/*}" ;; esac
[ -f models.txt ] && [ -f SHA256SUMS ] || die 'this is not a bundle: models.txt or SHA256SUMS is missing'
[ "$processes" -ge 1 ] || die '--processes must be at least 1'
if [ "$check" = yes ]; then
    sha256sum -c --quiet SHA256SUMS || die 'files are damaged: unpack the bundle again'
fi
mkdir -p "$out" engines || die "cannot write to $out"

look_around

# --- one network ------------------------------------------------------------------------------------------------

failed=0
reason=''

measure() { # name
    : >"$out/$1/compute.tmp"
    run=1
    while [ "$run" -le "$processes" ]; do
        times=$out/$1/times-$run.json
        say "$1: measuring for $duration s, process $run of $processes"
        # shellcheck disable=SC2046
        if ! "$trtexec" "--loadEngine=engines/$1.engine" "--warmUp=$((warmup * 1000))" "--duration=$duration" \
            "--exportTimes=$times" $(measure_flags) >"$out/$1/measure-$run.log" 2>&1 || [ ! -s "$times" ]; then
            fail_with "$out/$1/measure-$run.log"
            rm -f "$out/$1/compute.tmp"
            return 1
        fi
        compute_times "$times" >>"$out/$1/compute.tmp"
        run=$((run + 1))
    done
    sort -n "$out/$1/compute.tmp" >"$out/$1/compute.txt"
    rm -f "$out/$1/compute.tmp"
    runs=$(wc -l <"$out/$1/compute.txt" | tr -d ' ')
    [ "$runs" -gt 0 ] || {
        reason='trtexec wrote no computeMs'
        return 1
    }
    median=$(milli "$(at_share "$out/$1/compute.txt" "$runs" 50)")
    p90=$(milli "$(at_share "$out/$1/compute.txt" "$runs" 90)")
    p99=$(milli "$(at_share "$out/$1/compute.txt" "$runs" 99)")
    say "$1: median $median ms, p90 $p90 ms, p99 $p99 ms, $runs runs"
}

profile() { # name: times of the layers, in a separate run because profiling slows it; may fail
    "$trtexec" "--loadEngine=engines/$1.engine" --warmUp=200 --duration=2 --dumpProfile --separateProfileRun \
        "--exportProfile=$out/$1/profile.json" "--exportLayerInfo=$out/$1/layers.json" \
        >"$out/$1/profile.log" 2>&1 || say "$1: no profile, see $out/$1/profile.log"
}

compare() { # trtexec's output file, reference file -> $worst (millionths), $same (1 or 0); fails if a value is not a number
    worst=0 same=0 best='' best_place=-1 want_best='' want_place=-1 place=0
    text=$(tr -d ' \n\t' <"$1")
    case $text in *'"values":['*) ;; *) return 1 ;; esac
    text=${text#*'"values":['}
    text=${text%%']'*}
    exec 3<"$2"
    old_ifs=$IFS IFS=,
    for item in $text; do
        IFS=$old_ifs
        read -r want <&3 || break
        to_micro "$item" || {
            exec 3<&-
            return 1
        }
        gap=$((micro - want))
        [ "$gap" -ge 0 ] || gap=$((-gap))
        [ "$gap" -le "$worst" ] || worst=$gap
        if [ -z "$best" ] || [ "$micro" -gt "$best" ]; then best=$micro best_place=$place; fi
        if [ -z "$want_best" ] || [ "$want" -gt "$want_best" ]; then want_best=$want want_place=$place; fi
        place=$((place + 1))
    done
    IFS=$old_ifs
    left=$(wc -l <"$2" | tr -d ' ')
    exec 3<&-
    [ "$place" -eq "$left" ] || return 1
    [ "$best_place" -ne "$want_place" ] || same=1
}

verify() { # name input-name allowed (millionths) least (number of samples that must agree)
    largest=0 agreed=0 samples=0
    for input in reference/input-*.bin; do
        index=${input#reference/input-} index=${index%.bin}
        # shellcheck disable=SC2086
        if ! "$trtexec" "--loadEngine=engines/$1.engine" "--loadInputs=$2:$input" --iterations=1 --warmUp=0 \
            --duration=0 "--exportOutput=$out/$1/output-$index.json" ${VERIFY_FLAGS:-} \
            >"$out/$1/verify-$index.log" 2>&1; then
            fail_with "$out/$1/verify-$index.log"
            return 1
        fi
        if ! compare "$out/$1/output-$index.json" "reference/output-$index.txt"; then
            reason="output $index does not have as many numbers as the reference"
            return 1
        fi
        samples=$((samples + 1)) agreed=$((agreed + same))
        [ "$worst" -le "$largest" ] || largest=$worst
    done
    say "$1: largest difference $(milli "$largest"), same first class for $agreed of $samples inputs"
    if [ "$largest" -gt "$3" ]; then
        reason="outputs differ by $(milli "$largest"), at most $(milli "$3") is allowed"
        return 1
    fi
    if [ "$agreed" -lt "$4" ]; then
        reason="the same first class for $agreed of $samples inputs, at least $4 were expected"
        return 1
    fi
}

one() { # name precision input-name allowed least -> writes a JSON object to $out/NAME/result.json
    rm -rf "${out:?}/$1"
    mkdir -p "$out/$1" || die "cannot write to $out"
    [ -n "$workspace" ] || workspace=$(cat workspace.txt)
    status=ok reason='' median=0 p90=0 p99=0 runs=0 largest=0 agreed=0 samples=0
    before=$(readings)
    if ! build "$1" "$2"; then
        status=build-failed
    elif ! measure "$1"; then
        status=measure-failed
    else
        profile "$1"
        verify "$1" "$3" "$4" "$5" || status=verify-failed
    fi
    if [ "$status" != ok ]; then
        say "$1: $status: $reason" && failed=1
    fi
    size=0
    [ -f "engines/$1.engine" ] && size=$(wc -c <"engines/$1.engine" | tr -d ' ')
    {
        printf '{"name": "%s", "precision": "%s", "status": "%s", ' "$1" "$2" "$status"
        printf '"reason": "%s", "onnx_sha256": "%s", ' "$reason" "$(sha256sum "models/$1.onnx" | cut -c 1-64)"
        printf '"engine_bytes": %s, "flags": "%s%s", ' "$size" "$(build_flags "$2")" "$(measure_flags)"
        printf '"median_ms": %s, "p90_ms": %s, "p99_ms": %s, "runs": %s, ' "$median" "$p90" "$p99" "$runs"
        printf '"largest_difference": %s, "agreed": %s, "samples": %s, ' "$(milli "$largest")" "$agreed" "$samples"
        printf '"before": {%s}, "after": {%s}}\n' "$before" "$(readings)"
    } >"$out/$1/result.json" || die "cannot write $out/$1/result.json: is the disk full?"
}

chosen=0
while read -r name precision input allowed least; do
    [ -z "$only" ] || [ "$only" = "$precision" ] || continue
    chosen=$((chosen + 1))
    one "$name" "$precision" "$input" "$allowed" "$least" </dev/null
done <models.txt
[ "$chosen" -gt 0 ] || die "the bundle has no network of precision '$only'"

# --- the results ------------------------------------------------------------------------------------------------

{
    printf '{"format": 1, "bundle": "%s", ' "$(sha256sum SHA256SUMS | cut -c 1-64)"
    printf '"tensorrt": "%s", "l4t": "%s", "jetpack": "%s", ' "$version" "$l4t" "$jetpack"
    printf '"model": "%s", "power_mode": "%s", ' "$model_name" "$power_mode"
    printf '"duration_s": %s, "warmup_s": %s, "processes": %s, ' "$duration" "$warmup" "$processes"
    printf '"dla": "%s", "networks": [' "$dla"
    between=''
    while read -r name precision rest; do
        [ -z "$only" ] || [ "$only" = "$precision" ] || continue
        printf '%s\n' "$between" && cat "$out/$name/result.json"
        between=,
    done <models.txt
    printf ']}\n'
} >"$out/results.json.part" && mv "$out/results.json.part" "$out/results.json" || die "cannot write $out/results.json"
pack_results
exit "$failed"

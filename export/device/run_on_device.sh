#!/bin/sh
# Builds the engines of a bundle with trtexec, measures them in turns, and writes the results. Engines of a bundle with
# reference outputs are verified as well.
# Requirements: a POSIX shell, coreutils and TensorRT 8.0 or newer (JetPack 4.6 or newer).
#
#   sh run.sh                          everything
#   sh run.sh --only fp16 --processes 1 --duration 5
#   sh run.sh --identify               only the facts of this machine, one NAME=VALUE on each line
#
# Run it again after an interruption: engines are kept, and with many networks their measurements, too.
# Environment: TRTEXEC (path of trtexec), TRT_VERSION (such as 8.5.2, if it cannot be detected),
# VERIFY_FLAGS (more flags of trtexec for verification).
set -u
LC_ALL=C
export LC_ALL

duration='' warmup=2 processes=3 only='' out=results workspace='' dla='' check=yes keep=no identify=no streams=1

# --- messages and options -------------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

number() { # option value
    case $2 in '' | *[!0-9]*) die "$1 takes a whole number, got '$2'" ;; esac
}

full() { die "cannot write to $out: is the disk full?"; }

# --- this machine ---------------------------------------------------------------------------------------------

first_line_of() { # file -> its first line in printable characters, or nothing
    [ -r "$1" ] && head -n 1 "$1" | tr -d '\000"\\' | tr -cd '[:print:]'
}

find_trtexec() {
    for candidate in "${TRTEXEC:-}" /usr/src/tensorrt/bin/trtexec "$(command -v trtexec 2>/dev/null)"; do
        [ -n "$candidate" ] && [ -x "$candidate" ] && say "$candidate" && return
    done
}

find_version() { # trtexec's first line holds [TensorRT v8502] or [TensorRT v101303]
    if [ -n "${TRT_VERSION:-}" ]; then
        say "$TRT_VERSION" && return
    fi
    "$trtexec" --help 2>&1 </dev/null | head -n 20 | while read -r line; do
        case $line in
            *'[TensorRT v'*)
                digits=${line#*'[TensorRT v'}
                digits=${digits%%']'*}
                case $digits in '' | *[!0-9]*) continue ;; esac
                if [ "$digits" -lt 10000 ]; then
                    say "$((digits / 1000)).$((digits / 100 % 10)).$((digits % 100))"
                else
                    say "$((digits / 10000)).$((digits / 100 % 100)).$((digits % 100))"
                fi
                break
                ;;
        esac
    done
}

look_around() { # -> $trtexec $version $release $l4t $jetpack $model_name $power_mode; exits if something is missing
    trtexec=$(find_trtexec)
    [ -n "$trtexec" ] || die 'trtexec was not found: install TensorRT (sudo apt-get install tensorrt), or set TRTEXEC'
    version=$(find_version)
    case $version in
        [0-9]*.[0-9]*) ;;
        *) die "the version of $trtexec was not found: set TRT_VERSION, such as TRT_VERSION=8.5.2" ;;
    esac
    major=${version%%.*} minor=${version#*.} minor=${minor%%.*}
    release=$((major * 100 + minor))
    [ "$release" -ge 800 ] || die "TensorRT $version is too old: 8.0 (JetPack 4.6) or newer is needed"

    l4t=$(first_line_of /etc/nv_tegra_release)
    jetpack=''
    case $l4t in
        '# R32'*) jetpack=4.6 ;;
        '# R35'*) jetpack=5.1 ;;
        '# R36'*'REVISION: 2'* | '# R36'*'REVISION: 3'*) jetpack=6.0 ;;
        '# R36'*) jetpack=6.1 ;;
        '# R38'*) jetpack=7.0 ;;
    esac
    model_name=$(first_line_of /proc/device-tree/model)
    power_mode=''
    if command -v nvpmodel >/dev/null 2>&1; then
        power_mode=$(nvpmodel -q 2>/dev/null </dev/null | while read -r line; do
            case $line in *'Power Mode: '*) say "${line#*'Power Mode: '}" && break ;; esac
        done | tr -d '"\\' | tr -cd '[:print:]')
    fi
    say "TensorRT $version${jetpack:+, JetPack $jetpack}${model_name:+, $model_name}${power_mode:+, $power_mode}"
}

readings() { # clocks in MHz and temperatures in millidegrees, as members of a JSON object
    between=''
    for file in /sys/class/devfreq/*/cur_freq; do
        value=$(first_line_of "$file")
        case $value in '' | *[!0-9]*) continue ;; esac
        name=${file%/cur_freq}
        printf '%s"%s": %s' "$between" "${name##*/}" "$((value / 1000000))"
        between=', '
    done
    for folder in /sys/class/thermal/thermal_zone*; do
        name=$(first_line_of "$folder/type")
        value=$(first_line_of "$folder/temp" 2>/dev/null)
        case $name:$value in :* | *: | *:*[!0-9]*) continue ;; esac
        printf '%s"%s": %s' "$between" "$name" "$value"
        between=', '
    done
}

board_id() { # a hash of the serial number, which distinguishes boards of the same model
    for file in /proc/device-tree/serial-number /etc/machine-id; do
        known=$(first_line_of "$file" 2>/dev/null)
        [ -n "$known" ] && say "$known" | sha256sum | cut -c 1-16 && return
    done
    say unknown
}

# --- trtexec's flags, by version --------------------------------------------------------------------------------

build_flags() { # precision
    if [ "$release" -ge 804 ]; then
        printf ' --memPoolSize=workspace:%s' "$workspace"
    else
        printf ' --workspace=%s' "$workspace"
    fi
    if [ "$release" -ge 806 ]; then printf ' --skipInference'; else printf ' --buildOnly'; fi
    [ "$release" -ge 805 ] && printf ' --profilingVerbosity=detailed'
    if [ "$release" -lt 1000 ]; then
        case $1 in
            fp16) printf ' --fp16' ;;
            int8) printf ' --fp16 --int8' ;;
        esac
    elif [ "$release" -lt 1100 ]; then
        printf ' --stronglyTyped'
    fi
    [ -n "$dla" ] && printf ' --useDLACore=%s --allowGPUFallback' "$dla"
    return 0
}

measure_flags() { # these are the defaults of TensorRT 11
    [ "$release" -lt 1100 ] && printf ' --useCudaGraph --useSpinWait --noDataTransfers'
    if [ "$streams" -gt 1 ]; then
        if [ "$release" -ge 1000 ]; then printf ' --infStreams=%s' "$streams"; else printf ' --streams=%s' "$streams"; fi
    fi
    [ -n "$dla" ] && printf ' --useDLACore=%s' "$dla"
    return 0
}

# --- fixed-point numbers in POSIX shell -------------------------------------------------------------------------

to_micro() { # -1.25e-2 -> micro=-12500; fails if it is not a number, or 10^12 or more
    value=$1 sign='' exponent=0
    case $value in -*) sign=- value=${value#-} ;; +*) value=${value#+} ;; esac
    case $value in
        *[eE]*) exponent=${value##*[eE]} value=${value%%[eE]*} exponent=${exponent#+} ;;
    esac
    fraction=''
    case $value in *.*) fraction=${value#*.} value=${value%%.*} ;; esac
    digits=$value$fraction
    case $digits in '' | *[!0-9]*) return 1 ;; esac
    case $exponent in -*) plain=${exponent#-} ;; *) plain=$exponent ;; esac
    case $plain in '' | *[!0-9]*) return 1 ;; esac
    while :; do case $plain in 0?*) plain=${plain#0} ;; *) break ;; esac; done
    case $exponent in -*) exponent=-$plain ;; *) exponent=$plain ;; esac
    shift_by=$((exponent - ${#fraction} + 6))
    while [ "$shift_by" -gt 0 ]; do
        digits=${digits}0 shift_by=$((shift_by - 1))
        [ ${#digits} -le 60 ] || break
    done
    while [ "$shift_by" -lt 0 ] && [ -n "$digits" ]; do
        digits=${digits%?} shift_by=$((shift_by + 1))
    done
    while :; do case $digits in 0*) digits=${digits#0} ;; *) break ;; esac; done
    [ ${#digits} -le 18 ] || return 1
    micro=$sign${digits:-0}
}

compute_times() { # times file of trtexec -> its computeMs in millionths, one on each line
    tr ',{}' '\n\n\n' <"$1" | while read -r key colon value; do
        [ "$key$colon" = '"computeMs":' ] && to_micro "$value" && say "$micro"
    done
}

milli() { # 1234567 -> 1.234567
    padded=000000$(($1 % 1000000))
    while [ ${#padded} -gt 6 ]; do padded=${padded#?}; done
    printf '%s.%s' "$(($1 / 1000000))" "$padded"
}

at_share() { # file of sorted numbers, count, per cent -> percentile, linear between neighbours
    place=$((($2 - 1) * $3)) below=$((place / 100)) rest=$((place % 100))
    low=$(head -n $((below + 1)) "$1" | tail -n 1)
    high=$low
    [ "$rest" -gt 0 ] && high=$(head -n $((below + 2)) "$1" | tail -n 1)
    say $((low + (high - low) * rest / 100))
}

# --- an engine -----------------------------------------------------------------------------------------------

fail_with() { # log file -> $reason: its last line with an error
    reason=$(tr -cd '[:print:]\n' <"$1" | while read -r line; do
        case $line in *'[E]'* | *'rror'*) say "$line" ;; esac
    done | tail -n 1 | tr -d '"\\' | cut -c 1-300)
    [ -n "$reason" ] || reason="trtexec failed, see ${1##*/}"
}

build() { # name precision
    engine=engines/$1.engine
    stamp="$version $(sha256sum "models/$1.onnx" | cut -c 1-64)$(build_flags "$2")"
    if [ -f "$engine" ] && [ "$(cat "$engine.stamp" 2>/dev/null)" = "$stamp" ]; then
        say "$1: the engine exists"
        return 0
    fi
    rm -f "$engine" "$engine.stamp"
    say "$1: building, which may take minutes"
    # the flags contain no blanks: build_flags writes them, and numbers were checked
    # shellcheck disable=SC2046
    if "$trtexec" "--onnx=models/$1.onnx" "--saveEngine=$engine.part" "--timingCacheFile=engines/timing.cache" \
        $(build_flags "$2") >"$out/$1/build.log" 2>&1 && [ -s "$engine.part" ]; then
        mv "$engine.part" "$engine" && say "$stamp" >"$engine.stamp"
    else
        rm -f "$engine.part"
        fail_with "$out/$1/build.log"
        return 1
    fi
}

# --- options and the bundle ---------------------------------------------------------------------------------------

usage() {
    say 'usage: sh run.sh [--only PRECISION] [--duration SECONDS] [--warmup SECONDS] [--processes N]'
    say '                 [--workspace MIB] [--dla CORE] [--out FOLDER] [--keep-engines] [--skip-checksums] [--identify]'
}

while [ $# -gt 0 ]; do
    case $1 in
        --help | -h) usage && exit 0 ;;
        --identify) identify=yes && shift && continue ;;
        --skip-checksums) check=no && shift && continue ;;
        --keep-engines) keep=yes && shift && continue ;;
        --only | --duration | --warmup | --processes | --workspace | --dla | --out)
            [ $# -ge 2 ] || die "$1 takes a value" ;;
        *) usage >&2 && die "unknown option $1" ;;
    esac
    case $1 in
        --only) only=$2 ;;
        --out) out=$2 ;;
        --duration) number "$1" "$2" && duration=$2 ;;
        --warmup) number "$1" "$2" && warmup=$2 ;;
        --processes) number "$1" "$2" && processes=$2 ;;
        --workspace) number "$1" "$2" && workspace=$2 ;;
        --dla) number "$1" "$2" && dla=$2 ;;
    esac
    shift 2
done

if [ "$identify" = yes ]; then
    look_around >&2
    printf 'tensorrt=%s\njetpack=%s\nl4t=%s\n' "$version" "$jetpack" "$l4t"
    printf 'model=%s\npower_mode=%s\nboard=%s\n' "$model_name" "$power_mode" "$(board_id)"
    exit 0
fi

case $0 in */*) cd "${0%/*}" || die "cannot enter ${0%/*}" ;; esac
for file in kind.txt networks.txt order.txt workspace.txt SHA256SUMS; do
    [ -f "$file" ] || die "this is not a bundle: $file is missing"
done
[ "$processes" -ge 1 ] || die '--processes must be at least 1'
if [ "$check" = yes ]; then
    sha256sum -c --quiet SHA256SUMS || die 'files are damaged or missing: copy the bundle again'
fi
kind=$(cat kind.txt)
if [ -f energy.txt ]; then
    command -v tegrastats >/dev/null 2>&1 || die 'tegrastats was not found: energy is measured on Jetson modules only'
fi
[ -n "$workspace" ] || workspace=$(cat workspace.txt)
if [ -f streams.txt ]; then # networks that run at the same time
    streams=$(cat streams.txt)
    number streams.txt "$streams"
fi
# a timing bundle has many networks: its times are cut to what a shell reads quickly, its engines do not stay
case $kind in
    network) most=1000000000 keep=yes duration=${duration:-15} ;;
    timing) most=1000000 duration=${duration:-5} ;;
    *) die "unknown kind of bundle: $kind" ;;
esac
mkdir -p "$out" engines || full

look_around

names=' '
while read -r name precision rest; do
    [ -z "$only" ] || [ "$only" = "$precision" ] || continue
    names="$names$name "
    [ "$kind" = timing ] || rm -rf "${out:?}/$name"
    mkdir -p "$out/$name" || full
done <networks.txt
[ "$names" != ' ' ] || die "the bundle has no network of precision '$only'"

chosen() { case $names in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

board=$(board_id)
identity="TensorRT $version; power mode ${power_mode:-not known}; ${model_name:-a machine without a model name} $board"
if [ "$kind" = timing ] && [ -f "$out/identity.txt" ]; then # earlier measurements must be from this board
    before=$(cat "$out/identity.txt")
    [ "$before" = "$identity" ] || die "the folder $out was started with [$before], but this is [$identity]: continue with the former, or delete the folder $out to measure everything again"
else
    { say "$identity" >"$out/identity.part" && mv "$out/identity.part" "$out/identity.txt"; } || full
fi

# --- one network --------------------------------------------------------------------------------------------------

failed=0 reason='' broken=' '
median=0 p90=0 p99=0 runs=0 largest=0 agreed=0 samples=0

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
        printf '"engine_bytes": %s, "flags": "%s%s", ' "$size" "$(build_flags "$2")" "$(measure_flags)"
        printf '"median_ms": %s, "p90_ms": %s, "p99_ms": %s, "runs": %s, ' "$median" "$p90" "$p99" "$runs"
        printf '"largest_difference": %s, "agreed": %s, "samples": %s}\n' "$(milli "$largest")" "$agreed" "$samples"
    } >"$out/$1/result.part" && mv "$out/$1/result.part" "$out/$1/result.json" || full
    [ "$kind" = network ] || return 0
    printf '%s %s %s %s %s %s\n' "$3" "$median" "$p90" "$p99" "$size" "$(milli "$largest")" >"$out/$1/row.txt" || full
}

fail() { # name precision status
    say "$1: $3: $reason"
    describe "$1" "$2" "$3"
    failed=1 broken="$broken$1 "
}

summarise() { # files of times -> $median $p90 $p99 $runs
    cat "$@" | sort -n >"$out/sorted.part" || full
    runs=$(wc -l <"$out/sorted.part" | tr -d ' ')
    median=$(milli "$(at_share "$out/sorted.part" "$runs" 50)")
    p90=$(milli "$(at_share "$out/sorted.part" "$runs" 90)")
    p99=$(milli "$(at_share "$out/sorted.part" "$runs" 99)")
    rm -f "$out/sorted.part"
}

measure() { # name pass slot -> a file of times in millionths, and one of the state of the board
    times=$out/$1/times.part goal=$out/$1/$2-$3
    before=$(readings) watcher=''
    if [ -f energy.txt ]; then # the power of the module, ten times a second; not for ever if this script is killed
        timeout $((warmup + duration + 600)) tegrastats --interval 100 >"$out/$1/power.part" 2>/dev/null </dev/null &
        watcher=$!
    fi
    # shellcheck disable=SC2046
    "$trtexec" "--loadEngine=engines/$1.engine" "--warmUp=$((warmup * 1000))" "--duration=$duration" \
        "--exportTimes=$times" $(measure_flags) >"$out/$1/measure.log" 2>&1
    status=$?
    if [ -n "$watcher" ]; then
        kill "$watcher" 2>/dev/null
        wait "$watcher" 2>/dev/null
        tail -c 1000000 "$out/$1/power.part" | tr -cd '[:print:]\n' >"$out/$1/power-$2-$3.log" || full
    fi
    if [ "$status" -ne 0 ] || [ ! -s "$times" ]; then
        fail_with "$out/$1/measure.log"
        rm -f "$times"
        return 1
    fi
    tail -c "$most" "$times" >"$times.end" && compute_times "$times.end" >"$goal.part"
    rm -f "$times" "$times.end"
    [ -s "$goal.part" ] || {
        rm -f "$goal.part"
        reason='trtexec wrote no computeMs'
        return 1
    }
    {
        printf '{"tensorrt": "%s", "power_mode": "%s", "board": "%s", ' "$version" "$power_mode" "$board"
        printf '"before": {%s}, "after": {%s}}\n' "$before" "$(readings)"
    } >"$goal.json" && mv "$goal.part" "$goal.txt" || full
}

profile() { # name: times of the layers, in a separate run because profiling slows it
    layers=''
    [ "$kind" = timing ] || layers=--exportLayerInfo=$out/$1/layers.json
    # shellcheck disable=SC2086
    if "$trtexec" "--loadEngine=engines/$1.engine" --warmUp=200 --duration=2 --dumpProfile --separateProfileRun \
        "--exportProfile=$out/$1/profile.part" $layers >"$out/$1/profile.log" 2>&1 && [ -s "$out/$1/profile.part" ]; then
        mv "$out/$1/profile.part" "$out/$1/profile.json"
    else
        rm -f "$out/$1/profile.part" && say "$1: no profile, see $out/$1/profile.log"
    fi
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

verify() { # name input-name allowed (millionths) least (number of samples that must agree) reference
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
        if ! compare "$out/$1/output-$index.json" "reference/$5-$index.txt"; then
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

# --- all engines first, then all networks in turns ------------------------------------------------------------------

count=0 total=0
for name in $names; do total=$((total + 1)); done
while read -r name precision rest; do
    chosen "$name" || continue
    count=$((count + 1))
    if [ -f "$out/$name/result.json" ] && finished "$name"; then
        continue
    fi
    say "engine $count of $total"
    if build "$name" "$precision" </dev/null; then
        reason='' && describe "$name" "$precision" ok
    else
        fail "$name" "$precision" build-failed
    fi
done <networks.txt

forwards='' reversed='' total=0
while read -r name; do
    forwards="$forwards $name" reversed="$name $reversed" total=$((total + 1))
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
        chosen "$name" && [ ! -f "$out/$name/$pass-$slot.txt" ] && [ -f "engines/$name.engine" ] || continue
        if measure "$name" "$pass" "$slot" </dev/null; then
            summarise "$out/$name/$pass-$slot.txt"
            say "turn $pass of $processes, $done_now of $total: $name $median ms"
        else
            precision=$(while read -r each type rest; do [ "$each" = "$name" ] && say "$type"; done <networks.txt)
            median=0 p90=0 p99=0 runs=0
            fail "$name" "$precision" measure-failed
        fi
    done
    pass=$((pass + 1))
done

while read -r name precision input allowed least reference beside; do
    chosen "$name" && [ -f "engines/$name.engine" ] || continue
    case $broken in *" $name "*) continue ;; esac
    [ ! -f profile.txt ] || [ -f "$out/$name/profile.json" ] || profile "$name" </dev/null
    [ "$kind" = network ] || continue
    summarise "$out/$name"/*-*[0-9].txt
    say "$name: median $median ms, p90 $p90 ms, p99 $p99 ms, $runs runs"
    if verify "$name" "$input" "$allowed" "$least" "$reference" </dev/null; then
        reason='' && describe "$name" "$precision" ok
    else
        fail "$name" "$precision" verify-failed
    fi
done <networks.txt

# --- the table ------------------------------------------------------------------------------------------------------

share_of() { # median, median of the dense network -> tenths of a per cent as 41.5%
    to_micro "$1" && mine=$micro && to_micro "$2" && [ "$micro" -gt 0 ] || return 1
    tenths=$(((mine * 1000 + micro / 2) / micro))
    say "$((tenths / 10)).$((tenths % 10))%"
}

row() { # cells of a line
    printf "%-${wide}s  %-9s  %9s  %9s  %9s  %8s  %9s  %10s  %s\n" "$@"
}

if [ "$kind" = network ]; then
    wide=7
    for name in $names; do [ ${#name} -le "$wide" ] || wide=${#name}; done
    say ''
    row network precision 'median ms' 'p90 ms' 'p99 ms' 'of dense' 'engine MB' difference state
    while read -r name precision input allowed least reference beside; do
        chosen "$name" && read -r state median p90 p99 size largest <"$out/$name/row.txt" || continue
        of=''
        if [ "$beside" != - ] && [ -f "$out/$beside/row.txt" ] && [ "$state" != build-failed ]; then
            read -r other dense rest <"$out/$beside/row.txt" && of=$(share_of "$median" "$dense")
        fi
        hundredths=$(((size + 5000) / 10000))
        rest=$((hundredths % 100)) && [ "$rest" -ge 10 ] || rest=0$rest
        row "$name" "$precision" "$median" "$p90" "$p99" "$of" "$((hundredths / 100)).$rest" "$largest" "$state"
    done <networks.txt
    say ''
fi

# --- the results ----------------------------------------------------------------------------------------------------

after_words() { # file, words -> the text after their first occurrence, in printable characters
    tr -d '"\\' <"$1" | tr -cd '[:print:]\n' | while read -r line; do
        case $line in *"$2"*) say "${line#*"$2"}" && break ;; esac
    done
}

gpu='' capability='' clock=''
for name in $names; do
    for log in "$out/$name/measure.log" "$out/$name/build.log"; do
        [ -z "$capability" ] && [ -f "$log" ] || continue
        capability=$(after_words "$log" 'Compute Capability: ')
        gpu=$(after_words "$log" 'Selected Device: ')
        clock=$(after_words "$log" 'Compute Clock Rate: ')
    done
done

{
    printf '{"format": 3, "kind": "%s", "bundle": "%s", ' "$kind" "$(sha256sum SHA256SUMS | cut -c 1-64)"
    printf '"tensorrt": "%s", "l4t": "%s", "jetpack": "%s", ' "$version" "$l4t" "$jetpack"
    printf '"model": "%s", "power_mode": "%s", "board": "%s", ' "$model_name" "$power_mode" "$board"
    printf '"gpu": "%s", "compute_capability": "%s", "clock": "%s", ' "$gpu" "$capability" "$clock"
    printf '"duration_s": %s, "warmup_s": %s, "processes": %s, ' "$duration" "$warmup" "$processes"
    printf '"dla": "%s", "streams": %s, "networks": [' "$dla" "$streams"
    between=''
    for name in $names; do
        printf '%s\n' "$between" && cat "$out/$name/result.json"
        between=,
    done
    printf ']}\n'
} >"$out/results.json.part" && mv "$out/results.json.part" "$out/results.json" || full
rm -f "$out"/*/*.part
[ "$keep" = yes ] || [ "$failed" -ne 0 ] || rm -rf engines

# checksums of the files in $out, and one archive to copy back
(
    cd "$out" || exit 2
    rm -f SHA256SUMS
    for file in results.json identity.txt */*.json */*.txt */*.log; do
        if [ -f "$file" ]; then sha256sum "$file"; fi
    done >SHA256SUMS
) || full
if command -v tar >/dev/null 2>&1 && command -v gzip >/dev/null 2>&1; then
    tar -czf "$out.tar.gz.part" "$out" && mv "$out.tar.gz.part" "$out.tar.gz" && say "copy $out.tar.gz back"
else
    say "copy the folder $out back"
fi
exit "$failed"

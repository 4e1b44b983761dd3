# The shared part of the scripts for a device; `export.device.bundle` replaces their include line with it.
# Functions only. Those that build and measure need $out, $workspace, $dla, and a call of look_around before.

# --- messages and options -------------------------------------------------------------------------------------

say() { printf '%s\n' "$*"; }
die() {
    printf 'error: %s\n' "$*" >&2
    exit 2
}

number() { # option value
    case $2 in '' | *[!0-9]*) die "$1 takes a whole number, got '$2'" ;; esac
}

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

# --- identity of the board ------------------------------------------------------------------------------------

board_id() { # a hash of the serial number, which distinguishes boards of the same model
    for file in /proc/device-tree/serial-number /etc/machine-id; do
        known=$(first_line_of "$file" 2>/dev/null)
        [ -n "$known" ] && say "$known" | sha256sum | cut -c 1-16 && return
    done
    say unknown
}

after_words() { # file, words -> the text after their first occurrence, in printable characters
    tr -d '"\\' <"$1" | tr -cd '[:print:]\n' | while read -r line; do
        case $line in *"$2"*) say "${line#*"$2"}" && break ;; esac
    done
}

# --- results --------------------------------------------------------------------------------------------------

pack_results() { # checksums of the files in $out, and one archive to copy back
    (
        cd "$out" || exit 2
        rm -f SHA256SUMS
        for file in results.json identity.txt */*.json */*.txt */*.log; do
            [ -f "$file" ] && sha256sum "$file"
        done >SHA256SUMS
    ) || die "cannot write $out/SHA256SUMS: is the disk full?"
    if command -v tar >/dev/null 2>&1 && command -v gzip >/dev/null 2>&1; then
        tar -czf "$out.tar.gz.part" "$out" && mv "$out.tar.gz.part" "$out.tar.gz" && say "copy $out.tar.gz back"
    else
        say "copy the folder $out back"
    fi
}

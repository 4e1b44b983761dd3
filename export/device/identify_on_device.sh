#!/bin/sh
# Prints the facts of this machine and its TensorRT version, one NAME=VALUE on each line. Requirements: as
# run_on_device.sh.
set -u
LC_ALL=C
export LC_ALL

# include on_device_common.sh

exec 3>&1 >&2 # messages go to standard error
look_around
exec >&3
printf 'tensorrt=%s\njetpack=%s\nl4t=%s\n' "$version" "$jetpack" "$l4t"
printf 'model=%s\npower_mode=%s\nboard=%s\n' "$model_name" "$power_mode" "$(board_id)"

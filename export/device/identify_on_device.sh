#!/bin/sh
# Says which machine this is and which TensorRT it has, one NAME=VALUE a line. Needs what run_on_device.sh needs.
set -u
LC_ALL=C
export LC_ALL

# include on_device_common.sh

exec 3>&1 >&2 # what is said on the way is not part of the answer
look_around
exec >&3
printf 'tensorrt=%s\njetpack=%s\nl4t=%s\n' "$version" "$jetpack" "$l4t"
printf 'model=%s\npower_mode=%s\nboard=%s\n' "$model_name" "$power_mode" "$(board_id)"

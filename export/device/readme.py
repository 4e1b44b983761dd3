"""The README.txt of a bundle: what a person does on the device, step by step."""

from __future__ import annotations

from typing import Mapping, Sequence


def timing_readme(folder: str, device: str, count: int) -> str:
    """Return the text for many networks that are timed for a latency table."""
    return f"""{count} small networks for the {device}, to time on the device itself.

On the device (JetPack 4.6 or newer, or anything else with trtexec):

  sudo nvpmodel -q                 # shows the power mode; select the one that the network will run in
  sudo jetson_clocks               # fixes the clocks; otherwise latencies vary
  sh {folder}/run.sh

It builds one engine for each network with trtexec, measures all in turns, three times, and writes the folder
results and results.tar.gz beside run.sh; the engines are removed at the end. A build takes minutes. Run it again after
an interruption: it resumes where it stopped. Do not use the device in the meantime. Copy results.tar.gz back into
{folder}, and import it with:

  compress profile --import {folder}

An engine works only on this kind of device and with this TensorRT: do not copy engines.

  sh run.sh --help                 # options
  TRTEXEC=/path/to/trtexec sh run.sh
"""


def network_readme(folder: str, device: str, networks: Mapping[str, str], dense: Sequence[str], usable: bool) -> str:
    """Return the text for a network that is built, checked and timed.

    Args:
        folder: Name of the bundle's folder.
        device: Name of the device.
        networks: Name of each network -> its precision.
        dense: Names of those that are the network before compression.
        usable: Whether the program that runs a network is in the bundle.
    """
    width = max(map(len, networks)) + len(".onnx")
    listed = "\n".join(
        f"  models/{name + '.onnx':{width}}  {precision}, {'before' if name in dense else 'after'} compression"
        for name, precision in networks.items()
    )
    about_dense = (
        "\n   The network before compression is there to be timed: its weights may be untrained."
        if dense
        else ""
    )
    return f"""Networks for the {device}, to build, check and time on the board itself:

{listed}

The board needs trtexec, which comes with TensorRT; JetPack 4.6 or newer installs both. Steps 1 to 5 need no Python.

1. Copy {folder}.tar.gz to the board, and unpack it there:

     tar -xzf {folder}.tar.gz
     cd {folder}

2. Choose the power mode that the network will run in, and fix the clocks; otherwise times vary:

     sudo nvpmodel -q                 # shows the mode; sudo nvpmodel -m NUMBER selects another one
     sudo jetson_clocks

3. Stop what else uses the GPU, then run:

     sh run.sh                        # sh run.sh --help shows options, such as --only fp16

   It builds an engine of each network, which takes minutes, times all of them in turns, three times, and compares the
   outputs of each engine with those in reference/. After an interruption run it again: it goes on where it stopped.
   If trtexec is in an unusual place: TRTEXEC=/path/to/trtexec sh run.sh

4. Read the table at the end. It has the milliseconds of one input, the share of the time before compression in the
   same precision, and the largest difference of an output from the reference. "ok" says that the engine was built and
   timed and that its outputs are right; any other state is explained above the table.{about_dense}

5. Copy results.tar.gz back to the machine that wrote the bundle, and there:

     compress export RUN --bundle {folder}.tar.gz --import results.tar.gz
{_use(networks, dense) if usable else ""}
An engine works only on this kind of board and with this TensorRT. Build the engines anew after an update, and do not
copy them to another board.
"""


def _use(networks: Mapping[str, str], dense: Sequence[str]) -> str:
    slim = [name for name in networks if name not in dense]
    name = next((each for each in slim if networks[each] == "fp16"), slim[0])
    return f"""
6. Use the network. infer.py needs python3 with numpy, Pillow, and the Python module of TensorRT, which JetPack has:

     python3 infer.py --model engines/{name}.engine PHOTO.jpg
     python3 infer.py --model engines/{name}.engine DIR     # the accuracy on DIR/CLASS/*.jpg

   With onnxruntime in place of TensorRT: --model models/{name}.onnx. labels.txt has the classes, and preprocess.json
   says how a photograph becomes an input.
"""

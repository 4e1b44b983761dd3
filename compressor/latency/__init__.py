"""What a network takes on a device: tables of latency, how they are measured, and what they predict.

A device, by its name:

    provider     `TableProvider.for_device`: finds or measures a table, times networks, knows the channel steps
    measured     devices that run networks from here; `local` is this machine's CPU or GPU
    over_ssh     devices that ssh reaches; `remote_bundle`, `remote_table` and `layout` are what is copied
    backends/    the runtimes of this machine: `cpu` (ONNX Runtime), `gpu` (TensorRT and others)

From measurements to a table:

    sampling     which sub-networks are measured, and for how long
    networks     their ONNX files, and the operators that nodes belong to; `machine` tells which runs are undisturbed
    assemble     measured sub-networks -> table; `fit` has the models of operators and of whole networks
    stored       tables on disk, the cache, and the journal of an unfinished table

and its use:

    table        `LatencyTable`; `schema` is its file format
    operators    the costs and keys of operators, and the latency of all candidates
    estimate     the roofline of devices that were not measured
    paired       two networks timed in turns, and whether their ratio meets a target
    steps        widths at which latency jumps
    explain      why a slim network is not faster; `peaks` are the device's limits
"""

"""What may be removed from a network, what that costs, and the slim network.

A space is made once for a network, in this order:

    space       `PruningSpace`, the public face: groups, costs, plans, slicing
    build       traces the network and verifies the trace on a pruned copy
    trace       `Tracer`: follows a forward pass, and applies the rule of each operation
    registry    operation -> rule; `rules/` has the toolkit's
    facts       what a pass says: atoms, layers, counts, attributes
    groups      atoms -> groups, their settings and widths
    counts      costs as functions of widths; the formulas of one operator

and used for many plans:

    plan        `ChannelPlan`: which units each group keeps
    importance  scores of the units (`reconstruction`: by what compensation cannot replace)
    slicer      kept indices of each tensor; `skeleton` copies the modules, `attention` replaces those of fixed width
    compensate  refits the layers of a slim network (`moments`: for many plans; `least_squares`, `refit`: a layer;
                `replay`, `sites`, `moves`: what a pass computes; `calibration`, `verdict`: images, what is returned)
    artefact    saves and loads a slim network; `blueprint` sends a space to another process (`sameness`: whether
                a factory builds the same network)
    checks      verifies a slim network by fvcore and torch-pruning (`torch_pruning_cut`)
"""

"""sassbudget: a static throughput budget for every loop of a compiled CUDA kernel.

Reads SASS out of a cubin, object, library or executable (nvdisasm, cuobjdump), rebuilds the control-flow graph, finds the natural
loops and adds up what one iteration costs on each execution pipe of one SM. The largest sum is a lower bound on the cycles per
iteration, hence an upper bound on the throughput. It needs no GPU. It sees neither latency, nor barriers, nor memory stalls.
"""

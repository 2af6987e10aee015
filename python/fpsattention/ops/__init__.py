"""``torch.ops.fpsattn.*``: schemas, CPU kernels, fakes and derivatives (:mod:`.core` registers them), and the reference."""

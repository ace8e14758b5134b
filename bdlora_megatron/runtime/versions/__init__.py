"""Where Megatron-Core's releases from 0.14 to 0.19 differ for us, all of it in this package.

A difference is recognised by what the installed release offers where that can be seen, and by the
number where it cannot: release candidates and vendors' builds carry numbers that say little.

It is a package, and not one module, because its parts are wanted at different times: ``known`` by
the command line, before torch or Megatron-Core is imported; ``layers`` by training and converting,
which never import the inference engine; ``checkpoint`` by what saves; ``inference`` by the
benchmark; ``engine`` by serving.

| since | difference | here |
|---|---|---|
| 0.16 | shards for a checkpoint are told the process groups | ``layers.sharded_for_checkpoint`` |
| 0.16 | Transformer Engine's layers hold settings of quantisation | ``layers.share_quantization`` |
| 0.16 | ranks may be more than key-value heads, and share them | ``layers.shares_kv_heads`` |
| 0.16 | the inference engine keeps metadata of every request | ``known.require_engine`` |
| 0.17 | threads write a checkpoint's files, not forks of the process | ``checkpoint`` |
| 0.17 | the inference engine has one configuration, and other names | ``engine`` |
| 0.17 | the inference engine has a prefix cache | ``prefix``, ``known.prefix_caching`` |
| 0.18 | a layer specification builds its MLP by a ``partial``, not by a ``ModuleSpec`` | \
``layers.nested_submodules`` |
| 0.18 | the engine keeps rows and tokens on the host, logits in the controller | ``engine`` |
| 0.18 | a linear layer's constructor takes ``name``, its full one | our own is ``lora_name`` |
| 0.19 | a model is told that it answers, and no longer looks at whether it is given a cache | \
``inference`` |
| 0.19 | weights can be split over ranks that gather them for each use | \
``layers.weight_is_rebuilt`` |
"""

"""Checkpoints: find, inspect, load and convert them.

Read `checkpoint.py` first. The way of a tensor from disk to device:

    find.py               a model's name -> its folder
    checkpoint.py         inspect(folder) -> Checkpoint, from config.json and headers alone;
                          uses shards.py (safetensors headers), form.py (how weights are stored),
                          bnb4.py (bitsandbytes' companions of a weight), fused.py (our own form),
                          other_formats.py (names formats that are not read, for errors)
    tensor_names.py       the table: what each tensor name means and where it belongs
    loader.py             load(checkpoint) -> Mixtral: source.py reads float and bitsandbytes
                          tensors one by one, weight_mapping.py puts them into the model,
                          fused_reader.py reads our own form straight into it, and
                          fused_version1.py its older version
    convert.py            any checkpoint -> the fused form, by fused_writer.py, and back, by
                          to_bitsandbytes.py

Up to `tensor_names.py` nothing imports torch, so that a check answers in milliseconds.
"""

"""Checkpoints: finds, inspects, loads and converts them.

Read `checkpoint.py` first. A tensor passes these files on its way from disk to device:

    find.py             maps a model's name to its folder
    checkpoint.py       inspect(folder) returns a Checkpoint, from config.json and headers only;
                        uses shards.py (safetensors headers), form.py (the storage form),
                        bnb4.py (bitsandbytes' companion tensors), fused.py (our own form),
                        other_formats.py (names unsupported formats in errors)
    tensor_names.py     the table of tensor names and their weights
    loader.py           load(checkpoint) returns a Mixtral: source.py reads float and bitsandbytes
                        tensors one by one, weight_mapping.py copies them into the model,
                        fused_reader.py reads our own form straight into it, and
                        fused_version1.py its older version
    convert.py          converts any checkpoint to the fused form with fused_writer.py, and a
                        fused checkpoint back with to_bitsandbytes.py; destination.py has the
                        folder that it writes

The files up to `tensor_names.py` import no torch, so that a check takes milliseconds.
"""

"""What a run needs, by arithmetic, before anything is started.

`demand` says what each stage asks Ray for, `groups` what the nodes of a cluster file have and whether the two
fit; `shapes` counts a model's parameters, bytes and FLOPs, `devices` says what an accelerator gives,
`estimate` turns both and the recipe into memory, time and cost, and names what bounds them. Nothing here
imports torch or Ray.

    python -m medray.plan --config self_train/llava-1.5-7b --device a100-80gb --gpus 8
    python -m medray.plan --config self_train/llava-1.5-7b --fits cluster/aws.yaml
"""

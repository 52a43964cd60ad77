"""APE next to stock SGLang on one GPU, at the shape of Llama-3.1-8B with made-up weights in bf16.

``python -m benchmarks.gpu_speed run`` measures one engine in one process and writes raw samples;
``python -m benchmarks.gpu_speed report`` puts the files of several engines side by side. What each
figure means stands at the functions of :mod:`benchmarks.gpu_speed.sections`.
"""

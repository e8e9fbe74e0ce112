"""What a large run is taken to have at its disposal: the assumptions of docs/scale.md."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """What machines and services are taken to do, and to cost. Prices are in US dollars."""

    gpus: int = 64
    gpus_per_node: int = 8
    """Nodes are alike; trials spread evenly over them, as Ray places them."""

    gpu_flops: float = 990e12
    """Of a GPU in bfloat16, multiply-adds being two (NVIDIA's figure for an H100 SXM, without sparsity)."""

    model_utilisation: float = 0.4
    """Of these, in a forward pass of a language model."""

    training_utilisation: float = 0.15
    """The same in an autoencoder's step, whose latents are sparse and have to be chosen."""

    gpu_memory_bytes: float = 80e9
    gpu_bytes_per_second: float = 2e12
    """Of its memory, reached (3.35e12 by NVIDIA's figure)."""

    bucket_bytes_per_second: float = 1.4e9
    """Between the bucket and a process that reads or writes: 16 requests at a time (`storage.reading`) of 90 MB/s, as
    S3's guide to its performance has it. With one for each of a node's eight GPUs, 100 Gbit/s can take it."""

    link_bytes_per_second: float = 3e11
    """Between the GPUs of a node, reached (450e9 each way by NVIDIA's figure)."""

    angles_flops: float = 14e9
    """Of a process that compares layers, in float64 on one core: 0.6 ms for 32 layers of 4,096, as measured."""

    puts_per_second: float = 3500.0
    gets_per_second: float = 5500.0
    """Of one prefix, as S3 states them before it divides a prefix."""

    request_seconds: float = 0.02
    """That a small one takes, of which a process may have several under way."""

    packed_tokens_per_second: float = 1e6
    """Of the one process that tokenizes."""

    results_per_second: float = 200.0
    """That the driver takes in: receipts of shards, reports of trials."""

    mlflow_calls_per_second: float = 30.0
    """33 ms each, as measured on SQLite and over HTTP for ten figures a call."""

    gpu_hour: float = 3.0
    head_hour: float = 0.4
    put: float = 5e-6
    get: float = 4e-7
    gigabyte_month: float = 0.023

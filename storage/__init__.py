"""Token and activation stores on disk: Zarr v3, written shard by shard, exact after any crash."""

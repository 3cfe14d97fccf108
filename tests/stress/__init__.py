"""Programs that disturb long runs; `.ci/run` takes them at a small size."""

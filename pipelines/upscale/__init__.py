"""Parts of the FreeSwim method: windows, the dual path, its cache, the schedule, the encoder."""

"""From files to samples: data lists, splits, the start-up scan, the cache, data sets."""

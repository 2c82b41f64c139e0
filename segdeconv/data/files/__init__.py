"""Files of images and masks: decoding, channels, downloads, archives. May import nothing of `data` outside it."""

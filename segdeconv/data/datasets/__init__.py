"""The data sets, one file each. Every class states its own classes; `segdeconv.data` hands them on."""

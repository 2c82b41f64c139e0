"""The data sets, one module each, which also defines its classes. Import them from `segdeconv.data`."""

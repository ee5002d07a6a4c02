"""Arrays in, arrays out: the implementations that know which platform they run on."""

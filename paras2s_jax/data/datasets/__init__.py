"""Query sets as tensorflow-datasets: importing this package registers its builders."""

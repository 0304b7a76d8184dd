-- Run once, by the superuser, when the image makes the database. Afterwards the superuser has no password and gets
-- in through 'docker compose exec postgres psql -U postgres' alone.
-- The passwords may have been set before (docs/server.md).
\if :{?password}
\else
\set password `cat /run/secrets/postgres_password`
\set reader_password `cat /run/secrets/reader_password`
\endif
CREATE ROLE tuner LOGIN PASSWORD :'password';
CREATE ROLE tuner_reader LOGIN CONNECTION LIMIT 20 PASSWORD :'reader_password';
ALTER ROLE tuner_reader SET default_transaction_read_only = on;
ALTER ROLE tuner_reader SET temp_file_limit = '1GB';
CREATE DATABASE tuner OWNER tuner;
REVOKE ALL ON DATABASE tuner, postgres, template1 FROM PUBLIC;
GRANT CONNECT ON DATABASE tuner TO tuner_reader;
\connect tuner
-- Large objects and temporary tables would let the reader fill the disk, and advisory locks hold up those who write.
DO $$
DECLARE one regprocedure;
BEGIN
    FOR one IN SELECT oid FROM pg_proc WHERE proname ~ '^(lo_|lowrite$|loread$)' LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', one);
    END LOOP;
    FOR one IN SELECT oid FROM pg_proc WHERE proname ~ '^pg_(try_)?advisory_' LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', one);
        EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO tuner', one);
    END LOOP;
END
$$;
GRANT USAGE ON SCHEMA public TO tuner_reader;
ALTER DEFAULT PRIVILEGES FOR ROLE tuner GRANT SELECT ON TABLES TO tuner_reader;
ALTER ROLE postgres PASSWORD NULL;
